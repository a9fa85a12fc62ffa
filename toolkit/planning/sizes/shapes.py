"""Which micro-batches a limit permits: the sizes to try, the heaviest micro-batches of all epochs, a typical one.

A size is how many of the longest clips a micro-batch holds. Its padded frames are limited to those of so many clips,
and it may hold more of shorter ones: one long clip must not make every micro-batch small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from toolkit.batching.epochs import mixture_of
from toolkit.batching.lengths import draws_of_epoch, rung_above, sorting_lengths
from toolkit.batching.order import evaluation_order
from toolkit.batching.planned import ladder_of
from toolkit.corpus.packed import Corpus, Split
from toolkit.poses.augmentation import is_off
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Recipe

# Clips of a micro-batch for each of the longest ones that it could hold: limits what short clips' texts take.
MOST_SHORT_CLIPS = 4
# On GPUs those that are compared: the fewer, the less is padded.
SHORT_CLIPS = (MOST_SHORT_CLIPS, 1)
# Clips change their lengths from epoch to epoch by augmentation; later epochs have hardly longer ones.
MOST_EPOCHS = 50
SAMPLE = 256  # texts


@dataclass(frozen=True)
class Lengths:
    """What sizes depend on.

    Attributes:
        share: clips of a step that one rank gets, at most.
        longest, typical: frames to which a clip is padded after augmentation, over all epochs.
        long_texts, typical_texts: texts whose tokens are counted where the tokenizer is.
        frame_limit: the recipe's own limit of padded frames.
        token_rungs: to which texts are padded; empty = to the longest of a batch.
    """

    share: int
    longest: int
    typical: int
    long_texts: list[str]
    typical_texts: list[str]
    frame_limit: int | None = None
    token_rungs: tuple[int, ...] = ()

    def most_tokens(self, recipe: Recipe) -> int:
        """Of the longest text, padded. Texts count as a token for each byte: a plan needs no tokenizer."""
        longest = 1 + max(len(text.encode()) for text in self.long_texts)
        return rung_above(self.token_rungs, min(recipe.training.max_target_tokens, longest))


@dataclass(frozen=True)
class Shape:
    """A micro-batch; ``long_texts``: its texts are as long as the longest, else of typical length."""

    clips: int
    frames: int
    long_texts: bool = True


@dataclass(frozen=True)
class Limits:
    """Clips of a micro-batch and its padded frames, at most; None = no limit."""

    clips: int
    frames: int | None

    def in_words(self) -> str:
        """E.g. ``at most 128 clips and 18432 padded frames``."""
        return f"at most {self.clips} clips" + (f" and {self.frames} padded frames" if self.frames else "")


def lengths_of(resolved: ResolvedRun, split: Split) -> Lengths:
    """Read a training split."""
    recipe, mixture = resolved.recipe, mixture_of(split, resolved.recipe)
    share = -(-min(recipe.training.global_batch_size, mixture.epoch_clips) // resolved.data_parallel_size)
    ladder = ladder_of(split.frames, mixture, resolved)
    epochs = 1 if is_off(recipe.augmentation) else min(math.ceil(recipe.training.epochs), MOST_EPOCHS)
    draws = (draws_of_epoch(split.frames, recipe, epoch) for epoch in range(epochs))
    drawn = [sorting_lengths(split.frames, draw) for draw in draws]
    by_size = sorted(split.texts, key=lambda text: len(text.encode()))
    typical = max(1, int(np.median(drawn[0][mixture.epoch(0).clips])))
    return Lengths(
        share,
        longest=ladder.frames[-1] if ladder else max(int(frames.max()) for frames in drawn),
        typical=rung_above(ladder.frames, typical) if ladder else typical,
        long_texts=by_size[-SAMPLE:],
        typical_texts=by_size[:: -(-len(by_size) // SAMPLE)],
        frame_limit=recipe.training.micro_batch_frames,
        token_rungs=ladder.tokens if ladder else (),
    )


def sizes(share: int) -> list[int]:
    """The sizes that make sense, largest first: each needs one forward pass more, all passes being of one size."""
    return list(dict.fromkeys(-(-share // passes) for passes in range(1, share + 1)))


def limits_of(size: int, lengths: Lengths, short_clips: int = MOST_SHORT_CLIPS) -> Limits:
    """The limits by which micro-batches take no more than ``size`` of the longest clips do.

    They hold up to ``short_clips`` times as many shorter clips.
    """
    if size >= lengths.share:
        return Limits(lengths.share, lengths.frame_limit)
    shorter = min(short_clips, max(1, lengths.longest // lengths.typical))
    frames = size * lengths.longest
    return Limits(min(lengths.share, size * shorter), min(frames, lengths.frame_limit or frames))


def next_smaller(limits: Limits, lengths: Lengths) -> Limits | None:
    """Those of the largest size whose micro-batches take less than some limits permit; None where there are none."""

    def most(limits: Limits) -> tuple[int, float]:
        return limits.clips, math.inf if limits.frames is None else limits.frames

    clips, frames = most(limits)
    for size in sizes(lengths.share):
        for short_clips in SHORT_CLIPS:
            smaller = limits_of(size, lengths, short_clips)
            found = most(smaller)
            # The longest clips alone take as much with as many frames.
            is_less = found[1] < frames or (short_clips == MOST_SHORT_CLIPS and found[0] < clips)
            if is_less and found[0] <= clips and found[1] <= frames:
                return smaller
    return None


def heaviest(limits: Limits, lengths: Lengths) -> list[Shape]:
    """The micro-batches between which any other within the limits lies, in any order of the clips.

    With so many padded frames, the memory of a micro-batch is a sum of terms that are constant, grow with the length of
    its clips (attention in the encoder) or with their number (attention and scores in the decoder). Behind a language
    model clip and text are one sequence, whose attention grows with both and, for so many frames, has no maximum
    between the ends. Such a sum is largest at one end: for the longest clips, or for as many clips as there may be.
    """
    frames = limits.frames or limits.clips * lengths.longest
    few = max(1, min(limits.clips, frames // lengths.longest))
    shapes = [Shape(few, lengths.longest)]
    if limits.clips > few:
        shapes.append(Shape(limits.clips, max(1, frames // limits.clips)))
    return shapes


def generation_batches(corpus: Corpus, most: int) -> list[tuple[int, list[Shape]]]:
    """Padded frames of generation batches to try, ``most``, a half of it and so on, and the batches of each size.

    The batches are those of all splits that a run evaluates: those that it does not train on.
    """
    held_out = [split.frames for name, split in corpus.splits.items() if name != "train" and len(split)]
    frames = held_out or [corpus.splits["train"].frames]
    longest = max(int(lengths.max()) for lengths in frames)
    found = []
    while True:
        orders = [(lengths, batch) for lengths in frames for batch in evaluation_order(lengths, most)]
        shapes = {Shape(len(batch), int(lengths[batch[0]])) for lengths, batch in orders}
        found.append((most, sorted(shapes, key=lambda shape: (shape.clips, shape.frames))))
        if most <= longest:
            return found
        most //= 2


def typical(limits: Limits, lengths: Lengths) -> Shape:
    """A micro-batch of clips of typical length."""
    frames = limits.frames or limits.clips * lengths.typical
    return Shape(max(1, min(limits.clips, frames // lengths.typical)), lengths.typical, long_texts=False)
