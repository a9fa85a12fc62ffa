"""Makes translators as a run does: by a recipe, on a small corpus, from scratch or from one that was saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Clip, Corpus
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loading.weights import save_model, saved_state_dict
from toolkit.models.warm_start.filling import WarmStart
from toolkit.models.warm_start.plan import Plan, make_plan
from toolkit.models.warm_start.source import read_source
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import NO_LANDMARKS, LandmarkSet, load_landmark_set
from toolkit.recipe.resolve import resolve_named

SMALL = (
    *("model.tiny=true", "model.tokenizer=bytes", "model.dropout=0", "training.ctc_weight=0.1"),
    *("model.pose_encoder={kind: conv, hidden: 16, dropout: 0}", "ds.bf16.enabled=false"),
    "ds.torch_autocast.enabled=false",
)
HANDS = load_landmark_set("hands_body_50")
TEXTS = ("good day", "good night", "red sun", "blue moon")


@dataclass(frozen=True)
class Made:
    """A model of a run, and what it took."""

    model: PoseTranslator
    processor: PoseProcessor
    plan: Plan | None


def corpus_of(folder: Path, landmark_set: LandmarkSet, texts: Sequence[str] = TEXTS, fps: float = 12.5) -> Corpus:
    """Clips of random motion; landmarks have the same motion in every set."""
    clips = [Clip(f"clip-{n}", text, motion(landmark_set, 12, seed=n).numpy()) for n, text in enumerate(texts)]
    return write_corpus(folder, {"train": clips}, landmark_set, fps, NORMALISATION)


def with_features(corpus: Corpus, folder: Path, width: int, *, poses: bool = True) -> Corpus:
    """A copy of a corpus with random features of another network, beside the poses or instead of them."""

    def changed(clip: Clip, index: int) -> Clip:
        values = np.random.default_rng(index).normal(size=(len(clip.features), width)).astype(np.float16)
        found = clip.features if poses else np.empty((len(clip.features), 0, 3), np.float16)
        return replace(clip, features=found, video_features=values)

    clips = [changed(clip, index) for index, clip in enumerate(corpus.splits["train"])]
    landmark_set = corpus.landmark_set if poses else NO_LANDMARKS
    return write_corpus(folder, {"train": clips}, landmark_set, corpus.metadata.fps, NORMALISATION)


def motion(landmark_set: LandmarkSet, frames: int, seed: int) -> Tensor:
    """Random positions [frames, points, channels], float16; a landmark's are drawn by its name."""
    columns = []
    for component, point in landmark_set.points:
        generator = torch.Generator().manual_seed(seed + 1000 * sum(map(ord, component + point)))
        columns.append(torch.randn(frames, len(landmark_set.channels), generator=generator))
    return torch.stack(columns, dim=1).to(torch.float16)


def inputs_of(landmark_set: LandmarkSet, count: int = 4) -> dict[str, Tensor]:
    """A batch of the corpus' clips, all landmarks seen; labels are those of bytes."""
    poses = torch.stack([motion(landmark_set, 12, seed=n) for n in range(count)]).float()
    labels = torch.tensor([[byte + 3 for byte in text.encode()[:7]] for text in TEXTS[:count]])
    labels = torch.nn.functional.pad(labels, (0, 1), value=1)
    visible, frame_mask = torch.ones(poses.shape[:3], dtype=torch.bool), torch.ones(poses.shape[:2], dtype=torch.bool)
    return {"poses": poses, "visible": visible, "frame_mask": frame_mask, "labels": labels}


def make(
    corpus: Corpus,
    *overrides: str,
    recipe: str = "t5_small",
    ds: str = "zero2",
    seed: int = 0,
    start: WarmStart | None = None,
    base: Path | None = None,
) -> Made:
    """A model as a run builds it; ``seed`` draws its pose encoder, ``base`` gets its frozen weights."""
    resolved = resolve_named(recipe, [*SMALL, *overrides], 1, has_gpu=False, ds=ds, needs_data=False)
    processor = build_processor(resolved.recipe, corpus)
    plan = None
    if resolved.recipe.model.init_from and start is None:
        source = read_source(resolved.recipe.model.init_from)
        metadata = corpus.metadata
        widths = corpus.landmark_set, metadata.fps, processor.tokenizer, metadata.num_features
        plan = make_plan(source, resolved.recipe, *widths)
        start = WarmStart(plan, base, keeps_base=base is not None)
    torch.manual_seed(seed)
    return Made(build_translator(resolved, corpus, processor.tokenizer, start).eval(), processor, plan)


def save(folder: Path, made: Made) -> Path:
    """Save a model as a run does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, made.model, made.processor, saved_state_dict(made.model, keep=True))
    return folder


def train(model: PoseTranslator, inputs: dict[str, Tensor], steps: int, rate: float = 3e-3) -> None:
    """Adam on one batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        output = model(**inputs)
        (cross_entropy(output.logits, inputs) + 0.01 * output.ctc_logits.float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def cross_entropy(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), inputs["labels"].flatten())


@torch.no_grad()
def loss_of(model: PoseTranslator, inputs: dict[str, Tensor]) -> float:
    return float(cross_entropy(model(**inputs).logits, inputs))


@torch.no_grad()
def scores_of(model: PoseTranslator, landmark_set: LandmarkSet) -> Tensor:
    output = model(**inputs_of(landmark_set))
    return torch.cat([output.logits.flatten().float(), output.ctc_logits.flatten().float()])
