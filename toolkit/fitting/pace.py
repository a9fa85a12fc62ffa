"""How long passes of a rank on CPUs take by their padded frames, from the few that were timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from toolkit.planning.sizes.shapes import Shape

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
