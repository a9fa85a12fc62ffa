"""Overfit a few clips: the first thing to try on new data.

A model that cannot overfit eight clips has a broken pipeline or broken data, which hours of training would not fix.
Everything that hinders overfitting is off: augmentation, dropout, label smoothing, the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.corpus.packed import Clip, Clips, Corpus, Part, Split
from toolkit.errors import UserError
from toolkit.recipe.schema import Augmentation
from toolkit.scoring.predictions import Prediction
from toolkit.scoring.table import samples_text

MAX_STEPS = 400
# Nats per token at which every token is almost certain.
TARGET_LOSS = 0.01


class ClipSubset:
    """Some clips of a split, as a split."""

    def __init__(self, split: Split, indices: list[int]) -> None:
        self.split = split
        self.indices = indices

    @property
    def name(self) -> str:
        return self.split.name

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self.name, range(len(self))),)

    @property
    def frames(self) -> NDArray[np.int32]:
        """Frames of each clip, int32 [clips]."""
        return self.split.frames[self.indices]

    @property
    def uids(self) -> list[str]:
        return [self.split.uids[index] for index in self.indices]

    @property
    def texts(self) -> list[str]:
        return [self.split.texts[index] for index in self.indices]

    def values(self, column: str) -> list[str]:
        """What a column says of each clip."""
        values = self.split.values(column)
        return [values[index] for index in self.indices]

    def conditions(self) -> Iterator[dict[str, str]]:
        return self.read(np.arange(len(self))).conditions()

    def condition_counts(self) -> Iterator[tuple[dict[str, str], int]]:
        return ((known, 1) for known in self.conditions())

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, index: int) -> Clip:
        """The clip at ``index``."""
        return self.split.clip(self.indices[index])

    def read(self, indices: NDArray[np.int64]) -> Clips:
        """The clips at these indices, as a batch needs them."""
        return self.split.read(np.array(self.indices)[indices])

    def __iter__(self) -> Iterator[Clip]:
        return (self.clip(index) for index in range(len(self)))


def overfit_overrides(clips: int, world_size: int, name: str) -> list[str]:
    """Overrides of a recipe for overfitting so many clips.

    Raises:
        UserError: there are no clips, or fewer than ranks.
    """
    if clips < 1:
        raise UserError(f"--overfit {clips}: there must be at least 1 clip", "use --overfit 8")
    if clips < world_size:
        raise UserError(
            f"--overfit {clips}: fewer clips than the {world_size} ranks that share them",
            f"start at most {clips} ranks, or use --overfit {world_size} or more",
        )
    return [
        f"training.global_batch_size={clips}",
        f"training.max_steps={MAX_STEPS}",
        f"training.epochs={MAX_STEPS}",
        f"training.eval_every={MAX_STEPS}",
        f"training.save_every={MAX_STEPS}",
        "training.schedule=constant",
        "training.warmup_ratio=0.05",
        "training.label_smoothing=0",
        "training.weight_decay=0",
        "model.dropout=0",
        "model.pose_encoder.dropout=0",
        "model.feature_encoder.dropout=0",
        "data.epoch_clips=null",
        *(f"augmentation.{strength}=0" for strength in Augmentation.model_fields),
        f"run.dir=runs/{name}-overfit",
    ]


def few_clips(corpus: Corpus, count: int) -> Corpus:
    """A corpus whose training split is ``count`` clips with different texts, and whose dev split is the same clips.

    Corpora of a mix give them in turn.

    Raises:
        UserError: the corpus has fewer different texts.
    """
    train = corpus.splits["train"]
    texts, in_turn = train.texts, chain.from_iterable(zip_longest(*(part.clips for part in train.parts)))
    first_of_text: dict[str, int] = {}
    for index in (index for index in in_turn if index is not None):
        first_of_text.setdefault(texts[index], index)
        if len(first_of_text) == count:
            few: Any = ClipSubset(train, list(first_of_text.values()))
            return replace(corpus, splits={"train": few, "dev": few})
    raise UserError(
        f"--overfit {count}: the training split has only {len(first_of_text)} different texts",
        f"use --overfit {len(first_of_text)} or less",
    )


def overfit_verdict(predictions: list[Prediction], steps: int, loss: float) -> tuple[bool, str]:
    """Whether the model repeats the text of every clip, and a report for the terminal."""
    learnt = sum(row.hypothesis == row.reference for row in predictions)
    everything = learnt == len(predictions)
    if everything:
        meaning = "the pipeline from poses to text works on this data"
    elif loss < 1.0:
        meaning = "it is learning; give it more steps (training.max_steps) or a higher training.learning_rate"
    else:
        meaning = "it is not learning: check that poses and texts belong together, and training.learning_rate"
    text = f"learned {learnt} of {len(predictions)} clips in {steps} steps (loss {loss:.3f}): {meaning}"
    return everything, f"{samples_text(predictions)}\n\n{text}"
