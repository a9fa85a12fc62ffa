"""What the steps of an epoch are padded to in micro-batches of a size, and how long they take by the passes timed.

The order of an epoch is known before it starts, and so are the shapes of all its micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from toolkit.batching.epochs import mixture_of
from toolkit.batching.lengths import text_sizes
from toolkit.batching.planned import PlannedEpoch, ladder_of
from toolkit.corpus.packed import Split
from toolkit.fitting.shapes import Limits, Shape
from toolkit.recipe.resolve import ResolvedRun

MOST_STEPS = 50  # of an epoch that are looked at: with so many the padding is known to about 1 %


class FirstEpoch:
    """Steps of rank 0 in the first epoch, spread over it evenly.

    In each micro-batch of a step rank 0 has the longest clips, and the others wait for it.
    """

    def __init__(self, resolved: ResolvedRun, split: Split) -> None:
        recipe, mixture = resolved.recipe, mixture_of(split, resolved.recipe)
        ladder = ladder_of(split.frames, mixture, resolved)
        self._planned = PlannedEpoch.of(split.frames, text_sizes(split.texts, recipe), mixture, recipe, ladder, 0)
        self._world_size = resolved.data_parallel_size
        steps = len(self._planned.order)
        self._steps = range(0, steps, -(-steps // MOST_STEPS))

    @property
    def clips(self) -> float:
        """Clips of these steps, a rank's share."""
        return sum(len(self._planned.order[step]) for step in self._steps) / self._world_size

    def padded_frames(self, limits: Limits) -> NDArray[np.int64]:
        """Padded frames of each micro-batch of these steps, [micro-batches]; fillers count."""
        found = [
            clips * frames
            for step in self._steps
            for clips, frames in self._planned.shapes(step, 0, self._world_size, limits.clips, limits.frames)
        ]
        return np.array(found, dtype=np.int64)


# Of the seconds that a frame of the longest pass took: what each frame beyond it takes at least.
LEAST_MARGINAL = 0.5


@dataclass
class Pace:
    """How long passes take by their padded frames: on the lines through those that were timed, and through nothing.

    Shorter and longer ones are on the lines through the two shortest and the two longest, of one pass in proportion.
    """

    _timed: dict[int, list[float]] = field(default_factory=dict)  # seconds of each rank by padded frames

    @property
    def has_any(self) -> bool:
        """Whether a pass was timed."""
        return bool(self._timed)

    def add(self, shape: Shape, seconds: Sequence[float]) -> None:
        """A pass took each rank so long; the slowest one decides.

        Of several passes of one shape the fastest of each rank counts: others can only make a pass longer.
        """
        frames = shape.clips * shape.frames
        self._timed[frames] = list(map(min, seconds, self._timed.get(frames, seconds)))

    def seconds(self, padded_frames: NDArray[np.int64]) -> float:
        """Of passes with so many padded frames each, together."""
        frames, seconds = np.array(sorted((frames, max(ranks)) for frames, ranks in self._timed.items())).T
        found = np.interp(padded_frames, frames, seconds)
        shortest = seconds[0] / frames[0]
        slopes = np.maximum(0.0, np.diff(seconds) / np.diff(frames)) if len(frames) > 1 else np.array([shortest])
        # A pass of no frames takes no less than nothing.
        found -= min(slopes[0], shortest) * np.maximum(0.0, frames[0] - padded_frames)
        beyond = max(slopes[-1], LEAST_MARGINAL * seconds[-1] / frames[-1])
        found += beyond * np.maximum(0.0, padded_frames - frames[-1])
        return float(found.sum())
