"""Frames of clips as they are batched: drawn for each epoch where augmentation changes them.

The random stream of lengths is (seed, epoch, 1); the order of an epoch is drawn from (seed, epoch), what else changes a
clip from (seed, pass, 2, clip), what its prefix leaves out from (seed, pass, 3, clip), and the order of a
corpus in a pass from (seed, pass, 4, corpus).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolkit.poses.augmentation import draw_lengths, is_off, remaining_frames

if TYPE_CHECKING:
    from toolkit.recipe.schema import Recipe

Frames = NDArray[np.integer]


def draws_of_epoch(frames: Frames, recipe: Recipe, epoch: int) -> Frames | None:
    """Rows of :func:`draw_lengths` of the clips of an epoch; None without augmentation."""
    if is_off(recipe.augmentation):
        return None
    rng = np.random.default_rng((recipe.training.seed, epoch, 1))
    return draw_lengths(frames, recipe.augmentation, rng, max_frames=recipe.data.max_frames)


def text_sizes(texts: Iterable[str], recipe: Recipe) -> Frames | None:
    """Bytes of each text where it stands in one sequence with its clip, behind a language model; None elsewhere.

    Only their order counts, so no tokenizer is needed. Of a model that is neither a card nor here nothing is known.
    """
    # Imports pydantic, which a processor, whose batches have rungs, too, does without.
    from toolkit.recipe.model_cards import is_language_model_known

    if not is_language_model_known(recipe.model):
        return None
    return np.fromiter((len(text.encode()) for text in texts), dtype=np.int64)


def sorting_lengths(frames: Frames, draws: Frames | None) -> Frames:
    """The lengths by which an epoch sorts its clips: before frames are dropped, of which each clip loses its share."""
    return frames if draws is None else draws[:, 1]


def batch_lengths(frames: Frames, draws: Frames | None, recipe: Recipe) -> Frames:
    """The lengths that clips have in their batches."""
    return frames if draws is None else remaining_frames(draws[:, 1], recipe.augmentation)


def longest_of_any_epoch(frames: Frames, recipe: Recipe) -> int:
    """The most frames that augmentation can make of a clip of a split."""
    longest = int(frames.max())
    if is_off(recipe.augmentation):
        return longest
    slowest = round(longest * (1.0 + recipe.augmentation.speed))
    drawn = min(slowest, max(recipe.data.max_frames, longest))
    return int(remaining_frames(np.array([drawn]), recipe.augmentation)[0])


def rung_above(rungs: Sequence[int], length: int) -> int:
    """The lowest rung of at least ``length``; ``length`` itself where there is none."""
    place = bisect_left(rungs, length)
    return rungs[place] if place < len(rungs) else length
