"""What a step of a rank on CPUs takes at most, by the passes that it was timed by: where that is well within a limit,
the step need not be tried.

The activations of a micro-batch are a sum of terms, each proportional to its clips and to at most two factors out of
its frames and its tokens. With ``n`` clips of ``f`` frames and ``t`` tokens instead of ``n0``, ``f0`` and ``t0`` none
grows by more than ``n / n0 * max(f / f0, t / t0, 1) ** 2``. Where that is too much, they grow as in a traced pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from toolkit.planning.costs.counts import Weight
from toolkit.planning.costs.cpu_ranks import cpu_moments
from toolkit.planning.costs.tracing import Trace
from toolkit.recipe.resolve import ResolvedRun

# What a heap loses between blocks of several sizes, where freed memory goes back to the system: with the activations
# themselves so many times their bytes.
SPREAD = 1.25
UNKNOWN = 2**63 - 1  # bytes


@dataclass(frozen=True)
class Size:
    """Clips of a micro-batch, and frames and tokens to which they are padded."""

    clips: int
    frames: int
    tokens: int

    def growth(self, other: Size) -> float:
        """How often the activations of another one are in those of this one, at most."""
        wider = max(self.frames / other.frames, self.tokens / other.tokens, 1.0)
        return self.clips / other.clips * wider**2


@dataclass
class Passes:
    """The passes of a rank until now.

    Attributes:
        before: resident bytes before the first one, with the model in its engine.
        states: that a step has besides, at most: moments, gradients and copies.
        resets: whether the peak of a pass is its own, for the kernel resets the mark.
        spread: bytes of memory for each of the activations, in a run that is long.
    """

    before: int
    states: int
    resets: bool
    spread: float = SPREAD
    _peaks: list[tuple[Size, int]] = field(default_factory=list)

    def add(self, size: Size, peak: int) -> None:
        """A pass had so many resident bytes at most."""
        self._peaks.append((size, peak))

    def at_most(self, sizes: Sequence[Size]) -> int:
        """Resident bytes of a step over micro-batches of these sizes, at most; ``UNKNOWN`` before the first pass."""
        if not self._peaks:
            return UNKNOWN
        most = min(
            max(size.growth(passed) for size in sizes) * self._activations(number)
            for number, (passed, _) in enumerate(self._peaks)
        )
        return int(max(*(peak for _, peak in self._peaks), self.without_activations + self.spread * most))

    def at_most_by(self, sizes: Sequence[Size], traced: Callable[[Size], float]) -> int:
        """The same after a pass, closer: activations are in proportion to those of a pass that was traced, in bytes."""
        number = max(range(len(self._peaks)), key=lambda place: self._peaks[place][0].clips)
        passed, peak = self._peaks[number]
        most = max(map(traced, sizes)) / traced(passed) * self._activations(number)
        return int(max(peak, self.without_activations + self.spread * most))

    def in_a_long_run(self, resident: int) -> int:
        """Bytes that a run takes, of which a few steps took so many."""
        return resident + int((self.spread - SPREAD) * max(0, resident - self.without_activations))

    @property
    def without_activations(self) -> int:
        """Resident bytes of a step besides its activations, at most."""
        return self.before + self.states

    def _activations(self, number: int) -> float:
        """Bytes of those of a pass, at most.

        All by which it grew; or what it has more than an earlier pass with fewer clips, which leaves out gradients,
        buffers and code. The first pass does not count there: it makes the gradients. Neither does one after a larger
        one, whose memory the process may have kept.
        """
        own, peak = self._peaks[number]
        found = [float(peak - self.before)]
        widest = 0
        for place, (size, earlier) in enumerate(self._peaks[:number] if self.resets else []):
            if place and widest <= size.clips < own.clips and (size.frames, size.tokens) == (own.frames, own.tokens):
                found.append(max(0, peak - earlier) * own.clips / (own.clips - size.clips))
            widest = max(widest, size.clips)
        return min(found)


def states_of_a_step(module: nn.Module, resolved: ResolvedRun) -> int:
    """Bytes of all that a step holds besides activations, weights included, by the plan's arithmetic."""
    linear = {id(item) for layer in module.modules() if type(layer) is nn.Linear for item in layer.parameters()}

    def weight(parameter: Any) -> Weight:
        numel = getattr(parameter, "ds_numel", parameter.numel())
        return Weight(numel, parameter.requires_grad, linear=id(parameter) in linear)

    nothing = Trace(0.0, {}, 0.0, 0.0)
    _, moments = cpu_moments(
        [weight(parameter) for parameter in module.parameters()],
        resolved.recipe,
        resolved.deepspeed,
        resolved.world_size,
        micro_batches=2,
        first=nothing,
        later=nothing,
    )
    return int(max(sum(items.values()) for items in moments.values()))
