"""The stream of batches of one rank: worker processes read the memory map, augment and pad ahead of the model.

Nothing here depends on the number of workers: the order is fixed before they start, and whatever is random about a clip
follows from the seed, the epoch and the clip alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from toolkit.batching.collate import Batch, add_labels, pad
from toolkit.batching.order import (
    Indices,
    epoch_order,
    evaluation_order,
    micro_batches,
    micro_batches_by_frames,
    share_of_rank,
)
from toolkit.batching.workers import start_workers
from toolkit.poses.augmentation import augment, draw_lengths, is_off

if TYPE_CHECKING:
    from toolkit.corpus.packed import Clip, Split
    from toolkit.poses.landmarks import LandmarkSet
    from toolkit.recipe.resolve import ResolvedRun
    from toolkit.recipe.schema import Recipe

MAX_REFERENCE_TOKENS = 512


@dataclass(frozen=True)
class MicroBatch:
    """What a batch is made of.

    Attributes:
        clips: indices in the split; a filler is written ``~i``.
        epoch: decides, with the seed, how each clip is augmented.
        lengths: rows of :func:`draw_lengths` of these clips; None where nothing is augmented.
    """

    clips: Indices
    epoch: int = 0
    lengths: NDArray[np.integer] | None = None


class TrainBatches:
    """One rank's batches, step by step; its workers, if any, have started by the time it is made.

    Iterating gives for each optimizer step a list of batches: as many as its clips need under the limits of the recipe,
    on every rank the same number.
    """

    def __init__(self, steps: Iterator[list[MicroBatch]], batches: Iterator[Batch], labeller: Labeller) -> None:
        self._steps = steps
        self._batches = batches
        self._labeller = labeller

    def tokenise_by(self, tokenizer: Any) -> None:
        """Turn texts into labels by this tokenizer, from the next batch on."""
        self._labeller.tokenizer = tokenizer

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return [next(self._batches) for _ in next(self._steps)]

    def close(self) -> None:
        """End the workers; safe to call twice."""
        self._steps = iter(())
        self._batches = iter(())  # torch ends the workers of an iterator that nobody holds


def train_batches(
    split: Split,
    tokenizer: Any,
    resolved: ResolvedRun,
    *,
    landmark_set: LandmarkSet,
    epoch: int = 0,
    start_step: int = 0,
    epochs: int | None = 1,
    rank: int = 0,
) -> TrainBatches:
    """One rank's share of one or many epochs, from ``start_step`` of the first on.

    Targets are cut to ``training.max_target_tokens``; ``training/truncated_texts.py`` says how many that are.

    Args:
        split: the training split.
        tokenizer: a HuggingFace tokenizer; None where it comes later, by :meth:`TrainBatches.tokenise_by`. It works in
            this process: a large vocabulary takes half a gigabyte and seconds to load, and texts are short.
        resolved: batch arithmetic, seed, augmentation and number of workers.
        landmark_set: the corpus's landmarks; augmentation needs to know hands and mirror images.
        epoch: the first one, from 0.
        start_step: optimizer steps of this epoch that are done already.
        epochs: so many, one after the other; None without end.
        rank: which of ``resolved.world_size`` ranks this is.
    """
    recipe = resolved.recipe
    wanted = itertools.count(epoch) if epochs is None else range(epoch, epoch + epochs)
    plan = itertools.chain.from_iterable(
        _steps_of_epoch(split, resolved, number, start_step if number == epoch else 0, rank) for number in wanted
    )
    # The workers run ahead of the steps, so each follows the plan at its own pace.
    steps, steps_ahead = itertools.tee(plan)
    augmenter = None if is_off(recipe.augmentation) else Augmenter(recipe, landmark_set)
    dataset, labeller = _Padded(split, augmenter), Labeller(tokenizer, recipe.training.max_target_tokens)
    tasks = itertools.chain.from_iterable(steps_ahead)
    batches: Iterator[Batch]
    if recipe.training.workers:
        batches = start_workers(dataset, tasks, recipe.training.workers, labeller)
    else:
        batches = map(labeller, map(dataset.__getitem__, tasks))
    return TrainBatches(steps, batches, labeller)


def _steps_of_epoch(
    split: Split, resolved: ResolvedRun, epoch: int, start_step: int, rank: int
) -> Iterator[list[MicroBatch]]:
    """What each optimizer step of an epoch learns on this rank."""
    recipe = resolved.recipe
    training, world_size = recipe.training, resolved.world_size
    lengths = None if is_off(recipe.augmentation) else _lengths_of_epoch(split, recipe, epoch)
    # Clips meet others that are as long as they are once augmented: a changed speed costs no padding.
    frames = split.frames if lengths is None else lengths[:, 1]
    for clips in epoch_order(frames, training.global_batch_size, training.seed, epoch)[start_step:]:
        size, budget = training.micro_batch_size, training.micro_batch_frames
        if budget is None:
            shares = micro_batches(clips, rank, world_size, size)
        else:
            shares = micro_batches_by_frames(clips, frames, rank, world_size, size, budget)
        yield [
            MicroBatch(share, epoch, None if lengths is None else lengths[np.where(share < 0, ~share, share)])
            for share in shares
        ]


def _lengths_of_epoch(split: Split, recipe: Recipe, epoch: int) -> NDArray[np.integer]:
    # Streams of their own: the order of the epoch draws from (seed, epoch), clips from (seed, epoch, 2, clip).
    rng = np.random.default_rng((recipe.training.seed, epoch, 1))
    return draw_lengths(split.frames, recipe.augmentation, rng, max_frames=recipe.data.max_frames)


def evaluation_batches(
    split: Split,
    tokenizer: Any,
    batch_frames: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_target_tokens: int = MAX_REFERENCE_TOKENS,
) -> Iterator[Batch]:
    """Every clip of a split exactly once over all ranks, longest first, nothing augmented.

    The batches are the same for every number of ranks, which deal them out among themselves; every rank gets the same
    number of batches, the last of which may be one filler. They are made in this process: a search takes far longer.

    Args:
        split: any split.
        tokenizer: a HuggingFace tokenizer.
        batch_frames: largest number of padded frames in a batch (a longer clip comes alone).
        rank, world_size: which of how many ranks this is.
        max_target_tokens: longer references are cut in ``labels``; ``texts`` keeps them whole.
    """
    dataset, labeller = _Padded(split, None), Labeller(tokenizer, max_target_tokens)
    for share in share_of_rank(evaluation_order(split.frames, batch_frames), rank, world_size):
        yield labeller(dataset[MicroBatch(share)])


class Augmenter:
    """Augments a batch such that what happens to a clip follows from (seed, epoch, clip), whichever batch it is in."""

    def __init__(self, recipe: Recipe, landmark_set: LandmarkSet) -> None:
        self.settings = recipe.augmentation
        self.seed = recipe.training.seed
        self.landmark_set = landmark_set

    def __call__(self, batch: Batch, epoch: int, lengths: NDArray[np.integer] | None) -> Batch:
        assert lengths is not None
        batch.poses, batch.visible, batch.frame_mask = augment(
            batch.poses,
            batch.visible,
            batch.frame_mask,
            self.settings,
            self.landmark_set,
            lengths,
            [np.random.default_rng((self.seed, epoch, 2, clip)) for clip in batch.clips.tolist()],
        )
        batch.num_frames = int(batch.frame_mask[~batch.is_filler].sum())
        return batch


class Labeller:
    """Gives a batch its labels.

    Args:
        tokenizer: a HuggingFace tokenizer; it must be there by the first batch.
        max_target_tokens: longer targets are cut.
    """

    def __init__(self, tokenizer: Any, max_target_tokens: int) -> None:
        # Texts of a batch are few and short: threads gain nothing, and the library warns of every fork after them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tokenizer = tokenizer
        self.max_target_tokens = max_target_tokens

    def __call__(self, batch: Batch) -> Batch:
        try:
            return add_labels(batch, self.tokenizer, self.max_target_tokens)
        except Exception as error:
            error.add_note(_of_these(batch.uids))
            raise


class _Padded(Dataset[Batch]):
    """Makes batches without labels; this is what runs in the worker processes."""

    def __init__(self, split: Split, augmenter: Augmenter | None) -> None:
        self.split = split
        self.augmenter = augmenter

    def __getitem__(self, wanted: MicroBatch) -> Batch:
        clips: list[Clip] = []
        try:
            for index in wanted.clips.tolist():
                clips.append(self.split.clip(index if index >= 0 else ~index))
            batch = pad(clips, wanted.clips.tolist())
            return self.augmenter(batch, wanted.epoch, wanted.lengths) if self.augmenter else batch
        except Exception as error:
            if len(clips) < len(wanted.clips):
                index = int(wanted.clips[len(clips)])
                error.add_note(f"while clip {index if index >= 0 else ~index} of split {self.split.name} was read")
            else:
                error.add_note(_of_these([clip.uid for clip in clips]))
            raise


def _of_these(uids: list[str]) -> str:
    return f"in a batch of these clips: {', '.join(uids)}"
