"""Long recordings in overlapping windows: their start and end, and how their texts are joined."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolkit.errors import UserError

OVERLAP = 4.0
"""Seconds by which neighbouring windows overlap by default, at most a quarter of a window."""

MOST_FRAMES = 512
"""Longest window of a model without a limit of its own."""


def window_seconds(fps: float, max_frames: int | None, asked: float | None) -> float:
    """How long a window is in seconds: as ``asked`` for, else the longest that the model reads.

    Raises:
        UserError: the model reads no windows of that length.
    """
    longest = max((max_frames or MOST_FRAMES) - 1, 1) / fps
    shortest = 2 / fps
    if asked is None:
        return longest
    if not shortest <= asked <= longest:
        raise UserError(
            f"--window {asked:g}: not a window of this model, which reads {shortest:g} to {longest:g} seconds",
            f"choose {shortest:g} to {longest:g}, or 0 to read each clip whole, as in training",
        )
    return asked


def overlap_seconds(window: float, asked: float | None) -> float:
    """By how much windows overlap, in seconds.

    Raises:
        UserError: more than half of a window, or negative.
    """
    if asked is None:
        return min(OVERLAP, window / 4)
    if not 0 <= asked <= window / 2:
        raise UserError(
            f"--overlap {asked:g}: more than half of a window of {window:g} seconds, or negative",
            f"choose 0 to {window / 2:g}",
        )
    return asked


def window_spans(duration: float, window: float, overlap: float) -> list[tuple[float, float]]:
    """Start and end, in seconds, of windows of equal length that are evenly spread over a recording.

    Neighbours overlap by ``overlap`` seconds at least, which is less than ``window``. A recording no longer than
    ``window`` is one.
    """
    if duration <= window:
        return [(0.0, duration)]
    count = math.ceil((duration - overlap) / (window - overlap))
    step = (duration - window) / (count - 1)
    return [(number * step, number * step + window) for number in range(count)]


def without_repeats(texts: Sequence[str]) -> list[str]:
    """The texts of neighbouring windows, each without the words at its beginning that end the one before it.

    The signing of an overlap is translated twice; words that both windows have are kept once.
    """
    kept: list[str] = []
    before: list[str] = []
    for text in texts:
        words = text.split()
        shared = next(
            (size for size in range(min(len(before), len(words)), 0, -1) if before[-size:] == words[:size]), 0
        )
        kept.append(" ".join(words[shared:]) if shared else text)
        before = words or before
    return kept
