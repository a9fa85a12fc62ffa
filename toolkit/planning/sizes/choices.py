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
        recomputes: whether activations are recomputed.
    """

    size: int
    limits: Limits
    seconds: float | None = None
    recomputes: bool = False

    def is_less_than(self, other: Candidate) -> bool:
        """Whether it may fit where another one does not."""
        return self.size < other.size or (self.recomputes and not other.recomputes)


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """Of candidates, largest first, the largest that is about as fast as any; activations are kept where it is as fast.

    Those of unknown speed are taken in their order.
    """
    kept, recomputed = (
        _largest_as_fast([one for one in candidates if one.recomputes is recomputes]) for recomputes in (False, True)
    )
    if kept is None or recomputed is None:
        found = kept or recomputed
        assert found
        return found
    return recomputed if is_slower(kept.seconds, recomputed.seconds) else kept


def is_slower(kept: float | None, recomputed: float | None) -> bool:
    """Whether steps with activations that are kept take longer than those with recomputed ones, in seconds."""
    return kept is not None and recomputed is not None and kept > AS_FAST * recomputed


def _largest_as_fast(candidates: Sequence[Candidate]) -> Candidate | None:
    known = [one.seconds for one in candidates if one.seconds is not None]
    enough = AS_FAST * min(known) if known else 0.0
    return next((one for one in candidates if one.seconds is None or one.seconds <= enough), None)


def reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """Why one of some candidates is taken, in words."""
    alike = [one for one in candidates if one.recomputes is chosen.recomputes]
    found = "the largest that fit by the plan"
    if chosen != alike[0] and chosen.seconds and alike[0].seconds:
        saved = 1 - chosen.seconds / alike[0].seconds
        found = f"{saved:.0%} less time than in the largest that fit, which pad more, by the plan"
    kept = _largest_as_fast([one for one in candidates if not one.recomputes])
    if not chosen.recomputes or kept is None or not (kept.seconds and chosen.seconds):
        return found
    return f"{found}, and {1 - chosen.seconds / kept.seconds:.0%} less than with activations that are kept"


def families(run: ResolvedRun, lengths: Lengths) -> list[list[Candidate]]:
    """The micro-batches that a run may take, the largest of each kind first; a number of clips holds."""
    own = run.recipe.training.micro_batch_size
    if own != "auto":
        clips = min(own, lengths.share)
        return [[Candidate(clips, Limits(clips, lengths.frame_limit), recomputes=run.recomputes)]]
    return [
        [
            Candidate(size, limits_of(size, lengths, short_clips), recomputes=run.recomputes)
            for size in sizes(lengths.share)
        ]
        for short_clips in SHORT_CLIPS
    ]


@dataclass(frozen=True)
class Planned:
    """What candidates of a run are planned by.

    Attributes:
        subject, run, hardware: what is planned; the run says whether activations are recomputed.
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
        for every in families(self.run, self.lengths):
            low, high = 0, len(every)
            while low < high:
                middle = (low + high) // 2
                fits = self.fits(self.plan(every[middle].limits))
                low, high = (low, middle) if fits else (middle + 1, high)
            for one in every[low:]:
                found.setdefault(one.limits, one)
        if not found:
            return []
        longest = (1, self.lengths.longest, self.lengths.most_tokens(self.run.recipe))
        cost = PassCost.of(self.subject, self.run.deepspeed, longest, self.run.recomputes)
        plan = self.plan(next(iter(found)))
        speed = PassSpeed.of(self.run, self.subject.weights)
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
