"""The cells of benchmarks/planning_gpu.py: which there are, and the run that each stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from training_corpus import make_corpus

from toolkit.models.tokenizers import make_tokenizer

FRAMES, WORDS = 150, 20  # of every clip and its text
VOCABULARY = 4000  # words of five letters
HELD_OUT = 16  # clips of the dev split
STEPS = 3  # the first one makes the moments, the second one captures graphs
AS_WRITTEN = "training.compile=false"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        recipe: in recipes/.
        ds: a DeepSpeed JSON.
        clips: of each micro-batch.
        settings: of the recipe.
        ranks: GPUs.
        micro_batches: of a rank in a step.
    """

    recipe: str
    ds: str
    clips: int
    settings: tuple[str, ...] = (AS_WRITTEN,)
    ranks: int = 1
    micro_batches: int = 1

    @property
    def name(self) -> str:
        parts = [self.recipe, self.ds, str(self.clips)]
        parts += [] if self.micro_batches == 1 else [f"{self.micro_batches} micro-batches"]
        parts += [] if self.ranks == 1 else [f"{self.ranks} GPUs"]
        return "/".join([*parts, *(setting.split(".", 1)[-1] for setting in self.settings if setting != AS_WRITTEN)])


RECOMPUTED = (AS_WRITTEN, "training.gradient_checkpointing=true")
KEPT = (AS_WRITTEN, "training.gradient_checkpointing=false")
LORA = "model.lora.r=16"
NO_PROMPT = "model.prompt=null"  # its chat template is the published tokenizer's
CELLS = [
    *(
        Cell("t5_small", ds, 32)
        for ds in (
            *("zero0", "zero1", "zero2", "zero3", "zero2_autocast", "zero2_bf16_states", "zero3_bf16_states"),
            *("zero2_offload", "zero3_offload"),
        )
    ),
    *(Cell("t5_small", ds, 4, micro_batches=2) for ds in ("zero0", "zero1", "zero2", "zero3", "zero2_offload")),
    *(Cell("t5_small", ds, 16, ranks=2) for ds in ("zero0", "zero1", "zero2", "zero3")),
    *(Cell("t5_small", ds, 32, ("training.compile=graphs",)) for ds in ("zero0", "zero1")),
    *(Cell("t5_small", ds, 32, ("training.compile=true",)) for ds in ("zero0", "zero1", "zero2")),
    *(Cell("t5_small", ds, 32, RECOMPUTED) for ds in ("zero0", "zero1", "zero3")),
    Cell("t5_small", "zero1", 32, ("training.compile=auto",)),
    Cell("t5_small", "zero1", 32, (AS_WRITTEN, "model.pose_encoder=stgcn")),
    Cell("t5_small", "zero1", 32, (AS_WRITTEN, "model.pose_encoder=conformer")),
    Cell("t5_small", "zero1", 32, (AS_WRITTEN, "evaluation.graphs=false")),
    Cell("t5_small", "zero1", 32, (AS_WRITTEN, "training.ema=0.999")),
    *(Cell("t5_base", ds, 16) for ds in ("zero0", "zero1", "zero2", "zero3", "zero2_offload")),
    Cell("t5_base", "zero1", 16, ("training.compile=graphs",)),
    *(Cell("t5_base", "zero2", 16, (*kept, LORA)) for kept in (KEPT, RECOMPUTED)),
    Cell("t5_base", "zero3", 16, (*RECOMPUTED, LORA)),
    *(Cell("bart_large", "zero2", 8, kept) for kept in (KEPT, RECOMPUTED)),
    Cell("mbart50", "zero2", 8, RECOMPUTED),
    Cell("transformer", "zero1", 32),
    Cell("demo", "zero1", 32),
    *(Cell("qwen2_5_0_5b", ds, 8, (*kept, NO_PROMPT)) for ds, kept in (("zero2", KEPT), ("zero3", RECOMPUTED))),
]


def overrides_of(cell: Cell, folder: Path) -> list[str]:
    """The recipe keys of a cell whose corpus and tokenizer are in ``folder``."""
    return [
        f"data.corpus={folder / 'corpus'}",
        f"model.tokenizer={folder / 'tokenizer'}",
        "model.from_scratch=true",
        f"training.micro_batch_size={cell.clips}",
        "training.micro_batch_frames=null",
        f"training.global_batch_size={cell.clips * cell.micro_batches * cell.ranks}",
        "training.workers=0",
        "training.epochs=100",
        *(f"augmentation.{name}=0" for name in ("speed", "time_warp", "frame_drop", "temporal_crop")),
        *cell.settings,
    ]


@cache
def made_data(folder: Path) -> Path:
    """Clips that are all alike long, so that each micro-batch is the heaviest, and a tokenizer with all their words."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(VOCABULARY)]
    clips = max(cell.clips * cell.micro_batches * cell.ranks for cell in CELLS) + HELD_OUT
    texts = [" ".join(draw.choice(words, WORDS)) for _ in range(clips)]
    make_corpus(folder / "corpus", clips, texts=texts, held_out=HELD_OUT, length=FRAMES)
    make_tokenizer("train", [*texts, *words]).save_pretrained(folder / "tokenizer")
    return folder
