"""The most memory that a rank has had in each phase of a run, and the micro-batches that took it.

A phase is one of the plan's: the start, steps, evaluations, saves. On a GPU the allocator's own peaks are read and
reset where one phase ends and the next begins, which waits for no kernel. The resident peak of a process is reset by
the kernel where that is permitted; where it is not, a phase is only known where it has raised the peak.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import distributed as dist

from toolkit.batching.collate import Batch
from toolkit.cpu.unused_memory import UnusedMemory

Phase = Literal["start", "step", "evaluation", "save"]
PHASES: tuple[Phase, ...] = ("start", "step", "evaluation", "save")
# Of each phase: the process's resident memory, and of its GPU what torch has allocated and reserved.
KINDS = ("process", "allocated", "reserved")
GIB = 2**30
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_RESIDENT_PEAK = "5"  # what the kernel wants to read in RESET
MOST_SHAPES = 16  # of micro-batches; a run that computes more of them fills every cache of kernels
GROWTH = 1.01  # peaks that differ by less are the same

Peaks = dict[str, dict[str, float]]  # GiB by phase and kind; what is not known is left out


@dataclass(frozen=True)
class Shape:
    """A micro-batch with its padding."""

    clips: int
    frames: int
    tokens: int

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        clips, frames = batch.frame_mask.shape
        return cls(clips, frames, batch.labels.shape[1])

    def __str__(self) -> str:
        return f"{self.clips} clips x {self.frames} frames x {self.tokens} tokens"

    @property
    def padded(self) -> tuple[int, int]:
        """Frames and tokens of all clips."""
        return self.clips * self.frames, self.clips * self.tokens


def heaviest(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    """The micro-batches of which one takes most, whatever a frame and a token take: corners of a convex hull."""
    corners: list[Shape] = []
    for shape in sorted(shapes, key=lambda shape: shape.padded):
        while corners and not _is_corner(corners[-2:], shape):
            corners.pop()
        corners.append(shape)
    return tuple(corners)


def _is_corner(last: Sequence[Shape], following: Shape) -> bool:
    """Whether the last corner stays one beside a shape with as many frames or more."""
    (frames, tokens), (more, others) = last[-1].padded, following.padded
    if others >= tokens:
        return False
    if len(last) == 1:
        return True
    fewer, most = last[0].padded
    return (frames - fewer) * (others - most) < (more - fewer) * (tokens - most)


@dataclass
class MemoryPhases:
    """Where this rank stands, and its peaks until now.

    Attributes:
        phase: that it is in; it begins with the start.
        batch: the micro-batch of the step that it is in, or of the last one.
        first, later: the heaviest micro-batches, among the first of a step and among the others.
        shapes: of all different micro-batches, at most one more than are named.
        peaks: of this rank.
        of_ranks: of the fullest rank, as far as the ranks have compared them.
        libraries: resident bytes of the process at the beginning.
        allocated: GiB that torch had on the GPU at the last look at it.
        unused: memory that is given back where a phase ends, so that the next one does not count it.
    """

    phase: Phase = "start"
    batch: Shape | None = None
    first: tuple[Shape, ...] = ()
    later: tuple[Shape, ...] = ()
    shapes: set[Shape] = field(default_factory=set)
    peaks: Peaks = field(default_factory=dict)
    of_ranks: Peaks = field(default_factory=dict)
    libraries: int = field(default_factory=lambda: psutil.Process().memory_info().rss)
    unused: UnusedMemory = field(default_factory=UnusedMemory)
    allocated: float = 0.0
    _before: float = 0.0  # the process's peak when the phase began
    _is_reset: bool = False  # whether what is read was reached in this phase; of the start all is

    def enter(self, phase: Phase) -> None:
        """End the phase that this rank is in and begin another."""
        self._read()
        self.unused.give_back()
        self.phase = phase
        self._reset()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Within it this rank is in another phase; afterwards in the one before. After an error it stays there."""
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)

    def see(self, number: int, batch: Batch) -> None:
        """A step computes its ``number``-th micro-batch, from 1."""
        self.batch = shape = Shape.of(batch)
        if len(self.shapes) <= MOST_SHAPES:
            self.shapes.add(shape)
        if number == 1 and shape not in self.first:
            self.first = heaviest([*self.first, shape])
        elif number > 1 and shape not in self.later:
            self.later = heaviest([*self.later, shape])

    def named_shapes(self) -> tuple[tuple[int, int, int], ...] | None:
        """Clips, frames and tokens of all different micro-batches of this rank; None where they are too many."""
        if len(self.shapes) > MOST_SHAPES:
            return None
        return tuple(sorted((shape.clips, shape.frames, shape.tokens) for shape in self.shapes))

    def seen(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step, each seen when it is computed."""
        for number, batch in enumerate(batches, start=1):
            self.see(number, batch)
            yield batch

    def highest(self, kind: str) -> float:
        """GiB of this rank at most, in all phases until now."""
        self._read()
        return max((values[kind] for values in self.peaks.values() if kind in values), default=0.0)

    def largest(self) -> float:
        """GiB of the fullest rank at most: of its GPU, else of its process."""
        kind = "allocated" if any("allocated" in values for values in self.of_ranks.values()) else "process"
        return max((values[kind] for values in self.of_ranks.values() if kind in values), default=0.0)

    def compare(self, device: torch.device) -> bool:
        """Compare the peaks of all ranks, which all call this; whether the largest have grown."""
        self._read()
        own = [[self.peaks.get(phase, {}).get(kind, -1.0) for kind in KINDS] for phase in PHASES]
        largest = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found: Peaks = {}
        for phase, values in zip(PHASES, largest.tolist(), strict=True):
            if known := {kind: value for kind, value in zip(KINDS, values, strict=True) if value >= 0}:
                found[phase] = known
        has_grown = any(
            value > GROWTH * self.of_ranks.get(phase, {}).get(kind, 0.0)
            for phase, values in found.items()
            for kind, value in values.items()
        )
        self.of_ranks = found
        return has_grown

    def _read(self) -> None:
        """Add what was reached since the last reset to the phase that this rank is in."""
        reached: dict[str, float] = {}
        resident = resident_peak_gib()
        if self._is_reset or resident > self._before:
            reached["process"] = resident
        if torch.cuda.is_available():
            self.allocated, reached["allocated"], reached["reserved"] = gpu_gib()
        values = self.peaks.setdefault(self.phase, {})
        for kind, value in reached.items():
            values[kind] = max(value, values.get(kind, 0.0))

    def _reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            RESET.write_text(RESET_RESIDENT_PEAK)
            self._is_reset = True
        except OSError:  # not Linux, or a container that forbids it
            self._is_reset = False
        self._before = resident_peak_gib()


def gpu_gib() -> tuple[float, float, float]:
    """What torch has on the GPU, the most that it had since the last reset, and the most that it reserved.

    One look at its figures: ``torch.cuda.memory_allocated`` and its kin write out all of them each time.
    """
    figures = torch.cuda.memory_stats_as_nested_dict()
    if not figures:  # torch has not used the GPU yet
        return 0.0, 0.0, 0.0
    allocated, reserved = figures["allocated_bytes"]["all"], figures["reserved_bytes"]["all"]
    return allocated["current"] / GIB, allocated["peak"] / GIB, reserved["peak"] / GIB


def resident_peak_gib() -> float:
    """The most main memory that this process has had since the last reset."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10 / GIB
    except OSError:
        pass  # not Linux
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10) / GIB


def memory_figures(peaks: Peaks, planned: dict[str, float]) -> dict[str, float]:
    """Peaks beside the plan's as named figures: ``step_allocated_gib``, ``step_planned_gib``."""
    named = {
        f"{phase}_{kind}_gib": round(value, 4) for phase, values in peaks.items() for kind, value in values.items()
    }
    return named | {f"{phase}_planned_gib": round(value, 4) for phase, value in planned.items()}
