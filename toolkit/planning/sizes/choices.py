"""Which micro-batches fit a GPU by the plan, and how long steps of the first epoch take in each.

Larger micro-batches launch less and pad more. What a run chooses on GPUs, ``launch/plan.py`` says where it knows the
corpus, and ``--ds auto`` compares, is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from toolkit.planning.hardware import Hardware
from toolkit.planning.plan import PassSpeed, Plan, make_plan, seconds_beside
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.pass_cost import PassCost
from toolkit.planning.sizes.shapes import SHORT_CLIPS, Lengths, Limits, heaviest, lengths_of, limits_of, sizes
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun

# Of the best time: a larger micro-batch that takes no more is taken, for launches may take longer than the plan says.
AS_FAST = 1.01


@dataclass(frozen=True)
class Candidate:
    """Micro-batches that fit by the plan.

    Attributes:
        size: of the longest clips in one.
        limits: of one.
        seconds: of a step of the first epoch, on average, by the model of the hardware; None = not known.
    """

    size: int
    limits: Limits
    seconds: float | None = None


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """Of candidates, largest first, the first one that is about as fast as any."""
    known = [one.seconds for one in candidates if one.seconds is not None]
    enough = AS_FAST * min(known) if known else 0.0
    return next(one for one in candidates if one.seconds is None or one.seconds <= enough)


def reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """Why one of some candidates is taken, in words."""
    largest = candidates[0]
    if chosen == largest or not chosen.seconds or not largest.seconds:
        return "the largest that fit by the plan"
    saved = 1 - chosen.seconds / largest.seconds
    return f"{saved:.0%} less time than in the largest that fit, which pad more, by the plan"


@dataclass(frozen=True)
class Planned:
    """What candidates of a run are planned by.

    Attributes:
        subject, run, hardware: what is planned.
        lengths, epoch: of the run's clips.
        workload: of which frames and tokens are replaced by those of a micro-batch.
        fits: whether a plan fits.
    """

    subject: Subject
    run: ResolvedRun
    hardware: Hardware
    lengths: Lengths
    epoch: FirstEpoch
    workload: Workload
    fits: Callable[[Plan], bool]

    def candidates(self) -> list[Candidate]:
        """All that fit, the largest first; empty where none does.

        Raises:
            UserError: the model cannot be traced.
        """
        found: dict[Limits, Candidate] = {}
        every = sizes(self.lengths.share)
        for short_clips in SHORT_CLIPS:
            low, high = 0, len(every)
            while low < high:
                middle = (low + high) // 2
                fits = self.fits(self.plan(limits_of(every[middle], self.lengths, short_clips)))
                low, high = (low, middle) if fits else (middle + 1, high)
            for size in every[low:]:
                limits = limits_of(size, self.lengths, short_clips)
                found.setdefault(limits, Candidate(size, limits))
        if not found:
            return []
        longest = (1, self.lengths.longest, self.lengths.most_tokens(self.run.recipe))
        cost = PassCost.of(self.subject, self.run.deepspeed, longest, self.run.recipe.training.gradient_checkpointing)
        speed, plan = PassSpeed.of(self.run, self.subject.weights), self.plan(limits_of(1, self.lengths))
        timed = [replace(one, seconds=self._seconds(one.limits, cost, speed, plan)) for one in found.values()]
        return sorted(timed, key=lambda one: (-one.size, -one.limits.clips))

    def plan(self, limits: Limits) -> Plan:
        """With the heaviest micro-batch that some limits permit, and the longest text behind each of its clips."""
        plans = (self._plan(shape.clips, shape.frames) for shape in heaviest(limits, self.lengths))
        return max(plans, key=lambda plan: plan.total)

    def _plan(self, clips: int, frames: int) -> Plan:
        workload = replace(
            self.workload,
            frames=frames,
            later_frames=frames,
            tokens=self.lengths.most_tokens(self.run.recipe),
            first_shapes=(),
            later_shapes=(),
        )
        return make_plan(self.subject, self.run, self.hardware, workload, micro_batch_size=clips)

    def _seconds(self, limits: Limits, cost: PassCost, speed: PassSpeed, plan: Plan) -> float:
        """Of a step on average; ``plan`` is any of the run's: what is beside the passes does not depend on them."""
        weights, steps = self.subject.weights, self.epoch.passes(limits)
        of_passes = sum(speed.seconds(cost.trace(passes)) for step in steps for passes in step)
        beside = sum(seconds_beside(plan, len(step), self.run, self.hardware, weights) for step in steps)
        return (of_passes + beside) / len(steps)


def planned_choices(
    subject: Subject,
    run: ResolvedRun,
    hardware: Hardware,
    workload: Workload,
    cache: dict[int, tuple[Lengths, FirstEpoch]],
) -> Planned | None:
    """What a run on other machines would choose from; None where it has its number, or no corpus is known.

    Args:
        subject, run, hardware, workload: what is planned.
        cache: of what runs with as many copies of the model share.
    """
    split, copies = workload.split, run.data_parallel_size
    if split is None or run.recipe.training.micro_batch_size != "auto":
        return None
    if copies not in cache:
        cache[copies] = lengths_of(run, split), FirstEpoch(run, split)
    return Planned(subject, run, hardware, *cache[copies], workload, lambda plan: not plan.lacking(hardware))
