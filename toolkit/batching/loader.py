"""Load the batches of one rank: worker processes read the memory map, augment and pad ahead of the model.

The number of workers does not change a batch: the order is fixed before they start, and the augmentation of a clip
depends on the seed, the pass over its corpus (with one corpus the epoch) and the clip alone.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from toolkit.batching.collate import IGNORED_LABEL, Batch, add_labels, pad, prefix_tokens
from toolkit.batching.epochs import EpochClips, mixture_of
from toolkit.batching.glosses import gloss_ids, gloss_vocabulary
from toolkit.batching.ladder import Ladder, token_rungs
from toolkit.batching.lengths import Frames, rung_above, text_sizes
from toolkit.batching.order import Indices, evaluation_order, share_of_rank
from toolkit.batching.planned import PlannedEpoch, ladder_of
from toolkit.batching.workers import start_workers
from toolkit.poses.augmentation import augment, augment_features, is_off
from toolkit.recipe.prompts import fill, own_words, placeholders

if TYPE_CHECKING:
    from toolkit.corpus.packed import Split
    from toolkit.poses.landmarks import LandmarkSet
    from toolkit.recipe.resolve import ResolvedRun
    from toolkit.recipe.schema import Recipe

MAX_REFERENCE_TOKENS = 512


@dataclass(frozen=True)
class MicroBatch:
    """The contents of a batch, before it is loaded."""

    clips: Indices  # indices in the split; a filler is written ``~i``
    passes: Indices | None = None  # of each clip, for its random generators; None where nothing is random
    lengths: Frames | None = None  # rows of :func:`draw_lengths` of these clips; None without augmentation
    padded_frames: int = 0  # to pad to, where no clip is longer


class TrainBatches:
    """An iterator over the batches of one rank; its workers, if any, are running.

    It gives a list of micro-batches for each optimizer step, on every rank the same number. ``ladder`` has the lengths
    to which they are padded; None = each to its longest clip and text.
    """

    def __init__(
        self, steps: Iterator[list[MicroBatch]], batches: Iterator[Batch], labeller: Labeller, ladder: Ladder | None
    ) -> None:
        self._steps = steps
        self._batches = batches
        self._labeller = labeller
        self.ladder = ladder

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Use this tokenizer from the next batch on."""
        self._labeller.tokenizer = tokenizer

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return [next(self._batches) for _ in next(self._steps)]

    def close(self) -> None:
        """End the workers; may be called twice."""
        self._steps = iter(())
        self._batches = iter(())  # torch ends the workers of an iterator without references


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
    """One rank's share of one or more epochs, from ``start_step`` of the first epoch on.

    Targets are truncated to ``training.max_target_tokens``; ``training/truncated_texts.py`` says how many that are.

    The tokenizer may come later, by :meth:`TrainBatches.set_tokenizer`; it is used in this process, because each copy
    of a large vocabulary takes half a gigabyte and seconds to load. ``epochs`` is None for no end.
    """
    recipe, mixture = resolved.recipe, mixture_of(split, resolved.recipe)
    ladder = ladder_of(split.frames, mixture, resolved)
    wanted = itertools.count(epoch) if epochs is None else range(epoch, epoch + epochs)
    sizes = split.frames, text_sizes(split.texts, recipe)
    planned = (PlannedEpoch.of(*sizes, mixture, recipe, ladder, number) for number in wanted)
    # The first epoch begins where the run stands.
    starts = zip(planned, itertools.chain([start_step], itertools.repeat(0)), strict=False)
    plan = itertools.chain.from_iterable(_steps_of_epoch(*start, resolved, rank) for start in starts)
    # The workers read the plan ahead of the steps.
    steps, steps_ahead = itertools.tee(plan)
    augmentation = (
        None if is_off(recipe.augmentation) else partial(_augmented, recipe=recipe, landmark_set=landmark_set)
    )
    model, training = recipe.model, recipe.training
    prefix = None
    words = own_words(model.prefix, model.prompt)
    if placeholders(words):
        prefix = Prefix(words, model.condition_dropout, training.seed)
    dataset = _Padded(split, augmentation, prefix)
    labeller = Labeller(tokenizer, training.max_target_tokens, model.max_prefix_tokens, ladder)
    if training.ctc_weight and training.ctc_target == "gloss":
        labeller.glosses = {gloss: place for place, gloss in enumerate(gloss_vocabulary(split.values("gloss")))}
    tasks = itertools.chain.from_iterable(steps_ahead)
    batches: Iterator[Batch]
    if recipe.training.workers:
        batches = start_workers(dataset, tasks, recipe.training.workers, labeller)
    else:
        batches = map(labeller, map(dataset.__getitem__, tasks))
    return TrainBatches(steps, batches, labeller, ladder)


def _steps_of_epoch(
    planned: PlannedEpoch, start_step: int, resolved: ResolvedRun, rank: int
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each optimizer step of an epoch."""
    arithmetic = rank, resolved.data_parallel_size, resolved.clip_limit, resolved.frame_limit
    for step in range(start_step, len(planned.order)):
        shares = planned.shares(step, *arithmetic)
        yield [_drawn(share, planned.drawn, planned.draws, padded_frames) for share, padded_frames in shares]


def _drawn(share: Indices, drawn: EpochClips, draws: Frames | None, padded_frames: int) -> MicroBatch:
    """The micro-batch of places in an epoch; fillers are written ``~place``."""
    places = np.where(share < 0, ~share, share)
    clips = drawn.clips[places]
    return MicroBatch(
        np.where(share < 0, ~clips, clips),
        drawn.passes[places],
        None if draws is None else draws[places],
        padded_frames,
    )


def evaluation_batches(
    split: Split,
    tokenizer: Any,
    batch_frames: int,
    rungs: Sequence[int] = (),
    *,
    rank: int = 0,
    world_size: int = 1,
    max_target_tokens: int = MAX_REFERENCE_TOKENS,
    prefix: str = "",
    max_prefix_tokens: int = 0,
) -> Iterator[Batch]:
    """Every clip of a split exactly once over all ranks, longest first, nothing augmented.

    The batches are the same for any number of ranks; every rank gets the same number of them, the last of which may be
    one filler. They are loaded in this process, because the search takes far longer.

    A clip longer than ``batch_frames`` is alone in its batch. References longer than ``max_target_tokens`` are
    truncated in ``labels``, but not in ``texts``. ``prefix`` names conditions of the clips, or is empty. With ``rungs``
    batches are padded to these lengths, and those of a rung have one number of clips.
    """
    dataset = _Padded(split, prefix=Prefix(prefix) if prefix else None)
    labeller = Labeller(tokenizer, max_target_tokens, max_prefix_tokens)
    for share in share_of_rank(evaluation_order(split.frames, batch_frames, rungs), rank, world_size):
        longest = int(split.frames[share if share[0] >= 0 else ~share].max())
        yield labeller(dataset[MicroBatch(share, padded_frames=rung_above(rungs, longest))])


def _augmented(batch: Batch, wanted: MicroBatch, recipe: Recipe, landmark_set: LandmarkSet) -> Batch:
    """Augment a batch; the changes of a clip depend on (seed, pass, clip) and not on its batch."""
    assert wanted.lengths is not None and wanted.passes is not None
    seed, passes = recipe.training.seed, wanted.passes

    def generators() -> list[np.random.Generator]:
        numbered = zip(passes.tolist(), batch.clips.tolist(), strict=True)
        return [np.random.default_rng((seed, number, 2, clip)) for number, clip in numbered]

    old_lengths = batch.frame_mask.sum(1).tolist()
    batch.poses, batch.visible, batch.frame_mask = augment(
        batch.poses,
        batch.visible,
        batch.frame_mask,
        recipe.augmentation,
        landmark_set,
        wanted.lengths,
        generators(),
        wanted.padded_frames,
    )
    if batch.video_features is not None:
        batch.video_features = augment_features(
            batch.video_features,
            recipe.augmentation,
            old_lengths,
            wanted.lengths,
            generators(),
            batch.frame_mask.shape[1],
        )
    batch.num_frames = int(batch.frame_mask[~batch.is_filler].sum())
    return batch


@dataclass(frozen=True)
class Prefix:
    """Words before the poses that differ from clip to clip."""

    template: str
    dropout: float = 0.0  # probability, per clip and condition, that a prefix leaves it out
    seed: int = 0

    def of(self, conditions: dict[str, str], index: int, number: int) -> str:
        """The prefix of the clip at ``index`` in pass ``number``; what it leaves out depends on the seed and these."""
        if self.dropout:
            drawn = np.random.default_rng((self.seed, number, 3, index)).random(len(conditions))
            conditions = {
                name: value
                for (name, value), chance in zip(conditions.items(), drawn, strict=True)
                if chance >= self.dropout
            }
        return fill(self.template, conditions)


# While a tokenizer reads a text it is in a mode of its own (target texts, truncation), and batches of training may be
# labelled by the thread that pins them while those of an evaluation are labelled.
_tokenizing = threading.Lock()


class Labeller:
    """Gives a batch its labels and the tokens of its prefixes; the tokenizer must be set before the first batch.

    ``ladder`` has the lengths to which they are padded; None = the longest of the batch.
    """

    def __init__(
        self, tokenizer: Any, max_target_tokens: int, max_prefix_tokens: int = 0, ladder: Ladder | None = None
    ) -> None:
        # The few short texts of a batch do not profit from threads, and the library warns of forks after using them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tokenizer = tokenizer
        self.max_target_tokens = max_target_tokens
        self.max_prefix_tokens = max_prefix_tokens
        self.rungs = ladder.tokens if ladder else ()
        self.prefix_rungs = token_rungs(max_prefix_tokens) if ladder else ()
        self.glosses: dict[str, int] | None = None  # the place of each in the vocabulary of the CTC head

    def __call__(self, batch: Batch) -> Batch:
        with _tokenizing:
            return self._labelled(batch)

    def _labelled(self, batch: Batch) -> Batch:
        try:
            if batch.prefixes is not None:
                batch.prefix_ids = prefix_tokens(
                    batch.prefixes, self.tokenizer, self.max_prefix_tokens, self.prefix_rungs
                )
            if self.glosses is not None:
                batch.gloss_labels = gloss_ids(batch.glosses, self.glosses, batch.is_filler, IGNORED_LABEL)
            return add_labels(batch, self.tokenizer, self.max_target_tokens, self.rungs)
        except Exception as error:
            error.add_note(_clips_note(batch.uids))
            raise


class _Padded(Dataset[Batch]):
    """Loads batches without labels, in the worker processes."""

    def __init__(
        self,
        split: Split,
        augmentation: Callable[[Batch, MicroBatch], Batch] | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self.split = split
        self.augmentation = augmentation
        self.prefix = prefix

    def __getitem__(self, wanted: MicroBatch) -> Batch:
        indices = np.where(wanted.clips < 0, ~wanted.clips, wanted.clips)
        try:
            clips = self.split.read(indices)
        except Exception as error:
            numbers = ", ".join(map(str, indices.tolist()))
            error.add_note(f"while these clips of split {self.split.name} were read: {numbers}")
            raise
        try:
            # Augmentation pads again: it changes the lengths.
            batch = pad(clips, wanted.clips, 0 if self.augmentation else wanted.padded_frames)
            if self.prefix:
                passes = [0] * len(clips) if wanted.passes is None else wanted.passes.tolist()
                numbered = zip(clips.conditions(), indices.tolist(), passes, strict=True)
                batch.prefixes = [self.prefix.of(conditions, index, number) for conditions, index, number in numbered]
            return self.augmentation(batch, wanted) if self.augmentation else batch
        except Exception as error:
            error.add_note(_clips_note(clips.texts["uid"]))
            raise


def _clips_note(uids: list[str]) -> str:
    return f"in a batch of these clips: {', '.join(uids)}"
