"""Plans of a run that has been measured: what its micro-batches should have taken, and what to change where it failed.

Unlike a plan before the run, these know the micro-batches that were computed and the rows of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.batching.ladder import fitted_rungs
from toolkit.batching.order import evaluation_shapes
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.planning.comparison import Advice, advice_for
from toolkit.planning.cpu_plan import make_cpu_plan
from toolkit.planning.hardware import CPU_LIBRARIES, FRAGMENTS, Hardware
from toolkit.planning.plan import make_plan
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Passes, Workload
from toolkit.recipe.batches import most_batch_frames
from toolkit.recipe.resolve import ResolvedRun


@dataclass(frozen=True)
class Computed:
    """The micro-batches of a run with most padded frames.

    Attributes:
        clips, frames: of the first micro-batch of a step.
        tokens: of the longest target of any.
        later: padded frames of any other micro-batch of a step; 0 where steps have one.
        first_shapes, later_shapes: clips, frames and tokens of the heaviest micro-batches, of which one took most; the
            figures above may be of several.
        shapes: clips, frames and tokens of all different micro-batches of a rank; None = too many to name.
    """

    clips: int
    frames: int
    tokens: int
    later: int = 0
    first_shapes: tuple[Passes, ...] = ()
    later_shapes: tuple[Passes, ...] = ()
    shapes: tuple[Passes, ...] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Computed:
        """From its fields, in which tuples may be lists, as in JSON."""
        lists = {name: tuple(map(tuple, value)) for name, value in values.items() if isinstance(value, list | tuple)}
        return cls(**values | lists)

    def workload(self, corpus: Corpus, resolved: ResolvedRun, *, on_gpu: bool = True) -> Workload:
        """The same with the batches of the evaluations, which GPUs pad to few lengths."""
        split = corpus.splits.get("dev") or corpus.splits["train"]
        rungs = fitted_rungs(split.frames, resolved.recipe.model.pose_encoder.frames_per_position) if on_gpu else ()
        evaluated = sorted(evaluation_shapes(split.frames, most_batch_frames(resolved.evaluation), rungs))
        return Workload(
            frames=self.frames,
            tokens=self.tokens,
            later_frames=max(1, self.later // self.clips) if self.later else self.frames,
            evaluated=tuple({evaluated[0], evaluated[-1]}),
            steps_per_epoch=1,
            source="the run's own micro-batches",
            shapes=self.shapes,
        )


def planned_phases(
    resolved: ResolvedRun, corpus: Corpus, hardware: Hardware, computed: Computed, rows: int
) -> dict[str, float]:
    """Bytes that torch should have allocated on the fullest rank's GPU, by phase; in about a second.

    Args:
        resolved, corpus: the run.
        hardware: it ran on.
        computed: its micro-batches.
        rows: of the vocabulary.

    Raises:
        UserError: the model cannot be traced.
    """
    subject = Subject.of(resolved.recipe, rows)
    first, later = computed.first_shapes, computed.later_shapes or computed.first_shapes
    workload = replace(computed.workload(corpus, resolved), first_shapes=first, later_shapes=later)
    plan = make_plan(subject, resolved, hardware, workload, micro_batch_size=computed.clips)
    # As in Plan.allocated: neither the context, what the allocator loses between its blocks, nor the pool of graphs.
    pools = {phase: 0.0 if phase == "start" else plan.zero.graph_pool for phase in plan.phases}
    return {phase: (size - hardware.context) / (1 + FRAGMENTS) - pools[phase] for phase, size in plan.phases.items()}


def planned_cpu_phases(
    resolved: ResolvedRun, corpus: Corpus, computed: Computed, rows: int, *, libraries: float, keeps: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that the fullest rank should have had in main memory, by phase, at least and at most; in some seconds.

    They differ where freed memory stays with the process: by what its heap loses between blocks.

    Args:
        resolved, corpus, computed, rows: as for :func:`planned_phases`.
        libraries: bytes of a process with all code and no model.
        keeps: whether freed memory stays with the process.

    Raises:
        UserError: the model cannot be traced.
    """
    subject = Subject.of(resolved.recipe, rows)
    workload = computed.workload(corpus, resolved, on_gpu=False)
    least, most = (
        make_cpu_plan(subject, resolved, workload, micro_batch_size=computed.clips, keeps=kept).phases
        for kept in (False, keeps)
    )
    own = libraries - CPU_LIBRARIES
    return {phase: size + own for phase, size in least.items()}, {phase: size + own for phase, size in most.items()}


def advice_within(
    seconds: float, resolved: ResolvedRun, corpus: Corpus, hardware: Hardware, computed: Computed, phase: str
) -> list[Advice]:
    """What to change in a run that ran out of memory in a phase: what saves most first, nothing that saves nothing.

    Args:
        seconds: after which no further change is planned.
        resolved, corpus, hardware, computed: the run.
        phase: of the plan.
    """
    end = time.monotonic() + seconds
    training = resolved.recipe.training.model_copy(update={"micro_batch_size": computed.clips})
    run = replace(resolved, recipe=resolved.recipe.model_copy(update={"training": training}))
    run = replace(run, micro_batch_size=computed.clips, choice=None).recomputing(resolved.recomputes)
    found: list[Advice] = []
    try:
        for advice in advice_for(run, hardware, computed.workload(corpus, resolved), phase):
            found.append(advice)
            if time.monotonic() > end:
                break
    except UserError:
        pass  # a model that cannot be traced
    return by_gain(found)


def by_gain(advice: Sequence[Advice]) -> list[Advice]:
    """Single changes that save at least a hundredth of a GiB, the largest gain first."""
    single = [one for one in advice if one.gain >= 0.01 * 2**30 and not one.change.startswith("all of them")]
    return sorted(single, key=lambda one: -one.gain)
