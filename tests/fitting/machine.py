"""A stand-in for the rehearsing process of a rank, which describes a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.fitting.bounds import UNKNOWN
from toolkit.fitting.hardware import GIB
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.planning.sizes.shapes import Shape

AUTO = ("training.micro_batch_size=auto", "training.global_batch_size=6", "augmentation.speed=0")


class Machine:
    """Takes a GiB for each clip of the widest step it has had, and 1 second plus ``per_clip`` for a pass."""

    def __init__(self, per_clip: float = 0.0, breaks_at: int = 10**9, error: Any = None) -> None:
        self.per_clip, self.breaks_at, self.error = per_clip, breaks_at, error
        self.steps: list[int] = []
        self.recomputed: list[bool] = []  # of each step, whether activations were
        self.recomputing_saves = 1  # times that as many clips fit then
        self.widest = 0
        self.starts = self.closed = 0
        self.most_generated = 10**9
        self.generated: list[int] = []
        self.timed: list[int] = []
        self.slow_passes: set[int] = set()  # by their number, from 1: another process ran beside them
        self.heaviest_asked = False
        self.at_most_gib: float | None = None  # for each clip of a step that was not taken; None = not known
        self.heaviest_at_most_gib: float | None = None  # the same where texts are the longest; None = as any other
        self.traced_gib: float | None = None  # the same by a traced pass

    def __call__(self, *_: Any, **__: Any) -> Machine:
        self.starts += 1
        return self

    def start(self) -> Measured:
        return Measured(room=100 * GIB, error=self.error)

    def step(self, shapes: Sequence[Shape], *, recomputes: bool) -> Measured:
        clips = max(shape.clips for shape in shapes)
        self.steps.append(clips)
        self.recomputed.append(recomputes)
        if clips >= self.breaks_at * (self.recomputing_saves if recomputes else 1):
            return Measured(problem="out of memory")
        self.widest = max(self.widest, clips)
        return Measured(resident=self.widest * GIB, address_space=2 * self.widest * GIB, error=self.error)

    def at_most(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        is_heaviest = any(shape.long_texts for shape in shapes)
        self.heaviest_asked |= is_heaviest
        gib = self.heaviest_at_most_gib if is_heaviest and self.heaviest_at_most_gib else self.at_most_gib
        most = UNKNOWN if gib is None else int(clips * gib * GIB)
        return Measured(resident=most, address_space=UNKNOWN)

    def traced(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        most = UNKNOWN if self.traced_gib is None else int(clips * self.traced_gib * GIB)
        return Measured(resident=most, address_space=UNKNOWN)

    def translation(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        self.generated.append(clips)
        return Measured(problem="out of memory" if clips > self.most_generated else None)

    def passes(self, shape: Shape) -> Measured:
        self.timed.append(shape.clips)
        seconds = 1.0 + self.per_clip * shape.clips
        return Measured(seconds=100.0 * seconds if len(self.timed) in self.slow_passes else seconds)

    def close(self) -> None:
        self.widest = 0
        self.closed += 1
