"""The cells of benchmarks/planning.py: which there are, which are chosen, and the run that each stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from toolkit.cluster.ops import is_built
from toolkit.errors import UserError
from toolkit.recipe.deepspeed.json_file import ds_config_names
from toolkit.recipe.resolve import resolve_named

RANKS, STEPS, MICRO_BATCHES = 2, 2, 2
FRAMES, WORDS = 64, 8  # of every clip
CLIPS = 128  # of the corpus: one step of the largest micro-batches
# What only a GPU host can run; tests/recipe holds the list to what the resolver refuses.
GPU_HOSTS = ("zero2_fp16", "zero3_plus_plus")


@dataclass(frozen=True)
class Model:
    """A model of its published dimensions, with so many layers that a cell takes less than a minute.

    Attributes:
        recipe: in recipes/.
        layers: of encoder and decoder each; None = as published.
        overrides: settings of the recipe.
    """

    recipe: str
    layers: int | None
    overrides: tuple[str, ...] = ()


LORA, NF4 = "model.lora.r=16", "model.quantization=nf4"
MODELS = {
    "t5_small": Model("t5_small", 3),
    "t5_base_lora": Model("t5_base", 2, (LORA,)),
    "t5_base_nf4": Model("t5_base", 2, (LORA, NF4)),
    "bart_large_lora": Model("bart_large", 2, (LORA,)),
    "demo": Model("demo", None),
}
MICRO_BATCH_SIZES = (1, 8, 32)


@dataclass(frozen=True)
class Cell:
    """One run of one model."""

    model: str
    ds: str
    clips: int
    recomputed: bool

    @property
    def name(self) -> str:
        return f"{self.model}/{self.ds}/{self.clips}/{'recomputed' if self.recomputed else 'kept'}"

    @property
    def spec(self) -> Model:
        return MODELS[self.model]


def all_cells() -> list[Cell]:
    """Every model, JSON, micro-batch and checkpointing that a CPU can run."""
    return [cell for cell in _combinations() if _is_allowed(cell)]


def jsons_of(model: str) -> list[str]:
    """The DeepSpeed JSONs under which a CPU can train a model."""
    return [name for name in _json_names() if _is_allowed(Cell(model, name, 1, recomputed=False))]


def _json_names() -> list[str]:
    names = [name for name in ds_config_names() if name not in GPU_HOSTS]
    return [name for name in names if not name.endswith("nvme") or is_built("async_io")]


def _combinations() -> Iterator[Cell]:
    yield from (Cell(*values) for values in product(MODELS, _json_names(), MICRO_BATCH_SIZES, (False, True)))


def _is_allowed(cell: Cell) -> bool:
    """Whether the compatibility table has this cell."""
    try:
        resolve_named(cell.spec.recipe, settings(cell), RANKS, has_gpu=False, ds=cell.ds, needs_data=False)
    except UserError:
        return False
    return True


def pairwise(cells: Sequence[Cell], least: int = 60) -> list[Cell]:
    """Cells that have every pair of values of two factors at least once, filled up to ``least``."""
    pairs = {cell: set(combinations(enumerate(asdict(cell).values()), 2)) for cell in cells}
    missing: set[Any] = set().union(*pairs.values())
    chosen: list[Cell] = []
    while missing or len(chosen) < min(least, len(cells)):
        seen: dict[Any, int] = {}
        for cell in chosen:
            for pair in pairs[cell]:
                seen[pair] = seen.get(pair, 0) + 1
        rest = [cell for cell in cells if cell not in chosen]
        # The most pairs that no cell has yet; then those that few have.
        best = max(rest, key=lambda cell: (len(pairs[cell] & missing), -sum(seen.get(pair, 0) for pair in pairs[cell])))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def settings(cell: Cell) -> list[str]:
    """Recipe keys of a cell, without those of its folder."""
    return [
        "model.from_scratch=true",
        "model.tokenizer=train",
        f"training.micro_batch_size={cell.clips}",
        f"training.global_batch_size={cell.clips * RANKS * MICRO_BATCHES}",
        "training.micro_batch_frames=null",
        f"training.gradient_checkpointing={str(cell.recomputed).lower()}",
        "training.workers=0",
        "training.epochs=100",
        f"training.max_steps={STEPS}",
        *(f"augmentation.{name}=0" for name in ("speed", "time_warp", "frame_drop", "temporal_crop")),
        *cell.spec.overrides,
    ]


def overrides_of(cell: Cell, folder: Path) -> list[str]:
    """All recipe keys of a cell whose corpus and models are in ``folder``."""
    return [*settings(cell), *shallow_backbone(cell.spec, folder), f"data.corpus={folder / 'corpus'}"]


def shallow_backbone(model: Model, folder: Path) -> list[str]:
    """The setting that names a folder with the card's configuration and fewer layers; none where all layers stay."""
    from toolkit.models.backbone_config import backbone_config
    from toolkit.recipe.load import load_recipe

    if model.layers is None:
        return []
    path = folder / f"{model.recipe}_{model.layers}_layers"
    if not path.exists():
        config = backbone_config(load_recipe(model.recipe, ["model.from_scratch=true"]).model)
        for key in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "num_hidden_layers"):
            if key in config.to_dict():
                setattr(config, key, model.layers)
        config.save_pretrained(path)
    return [f"model.backbone={path}"]


def make_corpus(folder: Path) -> None:
    """Clips that are all as long as the longest, so that each micro-batch is the heaviest."""
    import numpy as np

    from toolkit.corpus.packed import Clip, Metadata
    from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
    from toolkit.poses.features import NORMALISATION
    from toolkit.poses.landmarks import load_landmark_set

    landmarks = load_landmark_set("hands_body_50")
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(FRAMES, landmarks.num_points, landmarks.num_channels)).astype(np.float16)
    words = ["".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(500)]
    rows = [Clip(f"clip-{n}", " ".join(draw.choice(words, WORDS)), noise, f"video-{n}") for n in range(CLIPS)]
    (folder / "train").mkdir(parents=True)
    write_shard(folder / "train" / shard_name(0, 1), rows, landmarks.width)
    finish_split(folder / "train", landmarks.width)
    splits = {"train": {"clips": CLIPS, "frames": CLIPS * FRAMES}}
    finish_corpus(folder, Metadata(landmarks.to_dict(), 12.5, NORMALISATION, splits=splits))
