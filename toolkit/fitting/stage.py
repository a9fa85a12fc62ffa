"""What a rank needs to rehearse: its process, its limits, and what all ranks agree on after each question."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.cluster.cores import share_of_cores, usable_cores
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange
from toolkit.corpus.packed import Corpus
from toolkit.cpu.allocator import keeps_memory
from toolkit.errors import UserError
from toolkit.fitting.hardware import GIB
from toolkit.fitting.memory_limits import MemoryLimit, memory_limit
from toolkit.fitting.rehearsal import Rehearsal
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.planning.sizes.shapes import Lengths, Limits, Shape, heaviest
from toolkit.recipe.resolve import ResolvedRun

SHOWN_EVERY = 5.0  # seconds between lines about a rehearsal

Echo = Callable[[str], None]


@dataclass
class Stage:
    """What a rank needs to rehearse.

    Attributes:
        rehearsal: its process.
        lengths: of the clips.
        limit: what it may take on CPUs.
        keeps: whether it keeps there what it has freed.
        has_gpu: whether it computes on one.
        echo: prints a line on rank 0.
        shown: when the last line was printed, by the monotonic clock.
    """

    rehearsal: Rehearsal
    lengths: Lengths
    limit: MemoryLimit
    keeps: bool
    has_gpu: bool
    echo: Echo
    shown: float

    @classmethod
    def of(
        cls, resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, echo: Echo, *, has_gpu: bool
    ) -> Stage:
        own = usable_cores()
        threads = share_of_cores(own, exchange(own))
        limit = memory_limit(ranks.local_world_size)
        exchange(None)  # no rank takes memory before all have looked
        rehearsal = Rehearsal(resolved, ranks, corpus, lengths, threads, has_gpu=has_gpu)
        return cls(rehearsal, lengths, limit, keeps_memory(), has_gpu, echo, time.monotonic())

    def close(self) -> None:
        """End the rehearsal."""
        self.rehearsal.close()

    def show(self, text: str) -> None:
        """Print what was found, where nothing was printed for some seconds."""
        if time.monotonic() - self.shown >= SHOWN_EVERY:
            self.shown = time.monotonic()
            self.echo(f"  rehearsal: {text}")

    def step(self, limits: Limits, *, recomputes: bool) -> tuple[Measured, str | None]:
        """One step over the heaviest micro-batches within limits, and why it does not fit; None where it does."""
        return self._held_to_limit(self.rehearsal.step(heaviest(limits, self.lengths), recomputes=recomputes))

    def at_most(self, shapes: Sequence[Shape]) -> tuple[Measured, str | None]:
        """What a step takes at most by the passes until now, without taking it, and why it may not fit."""
        return self._held_to_limit(self.rehearsal.at_most(shapes))

    def traced(self, shapes: Sequence[Shape]) -> tuple[Measured, str | None]:
        """The same, closer, by traced passes."""
        return self._held_to_limit(self.rehearsal.traced(shapes))

    def translation(self, shapes: Sequence[Shape]) -> tuple[Measured, str | None]:
        """The search over the heaviest of some generation batches, and why it does not fit."""
        return self._held_to_limit(self.rehearsal.translation(shapes))

    def _held_to_limit(self, measured: Measured) -> tuple[Measured, str | None]:
        if measured.problem or self.has_gpu:
            return measured, measured.problem
        return measured, _over(measured, self.limit)

    def agreed(self, own: Measured, problem: str | None = None) -> tuple[list[Measured], str | None]:
        """What all ranks measured, and the problem that any of them had.

        Raises:
            UserError: a rank met an error that is not about memory.
        """
        everybody = exchange((own, problem))
        for rank, (measured, _) in enumerate(everybody):
            if measured.error:
                kind, arguments = measured.error
                if issubclass(kind, UserError):
                    raise kind(*arguments)
                raise UserError(
                    f"training.micro_batch_size=auto: the rehearsal of rank {rank} failed: {arguments[0]}",
                    "give a number instead: training.micro_batch_size=8",
                )
        problems = [(rank, problem) for rank, (_, problem) in enumerate(everybody) if problem]
        first = f"rank {problems[0][0]}: {problems[0][1]}" if problems else None
        return [measured for measured, _ in everybody], first


def _over(measured: Measured, limit: MemoryLimit) -> str | None:
    if measured.resident > limit.resident:
        return f"{measured.resident / GIB:.2f} GiB of memory, and {limit.resident / GIB:.2f} are there for it"
    if limit.address_space is not None and measured.address_space > limit.address_space:
        return (
            f"{measured.address_space / GIB:.2f} GiB of addresses, and ulimit -v leaves {limit.address_space / GIB:.2f}"
        )
    return None


class NothingFits(UserError):
    """Not one of the longest clips fits."""


def nothing_fits(resolved: ResolvedRun, problem: str | None) -> NothingFits:
    is_off = resolved.recipe.training.gradient_checkpointing is False
    recompute = "training.gradient_checkpointing=auto or " if is_off else ""
    return NothingFits(
        f"training.micro_batch_size=auto: not one of the longest clips fits: {problem}",
        f"set {recompute}a lower data.max_frames, or give another --ds; python "
        f"launch/plan.py --recipe {resolved.recipe.name} says what each saves",
    )
