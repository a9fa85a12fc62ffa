"""Whether a run recomputes activations for which its GPUs have the room."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.planning.hardware import GIB, Hardware
from toolkit.planning.plan import make_plan, step_seconds
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun

WORTH = 0.05  # of a step, below which nothing is said


@dataclass(frozen=True)
class NeedlessRecomputation:
    """What a run gains that keeps its activations.

    Attributes:
        clips: of the largest micro-batch that then fits, among halves of the run's own.
        gib: of a rank's memory, by the plan.
        saved: share of a step's time, by the model of the hardware; 0..1.
    """

    clips: int
    gib: float
    saved: float

    def in_words(self) -> str:
        """What to set, and what it gives, in a line."""
        return (
            f"activations fit, {self.gib:.2f} GiB a rank with micro-batches of {self.clips}: "
            f"training.gradient_checkpointing=false takes {self.saved:.0%} less time, by the model of the hardware"
        )


def needless_recomputation(
    subject: Subject, run: ResolvedRun, hardware: Hardware, workload: Workload, largest: int
) -> NeedlessRecomputation | None:
    """What a run would gain without gradient checkpointing; None where it has none, or too little memory without.

    ``training.gradient_checkpointing: auto`` needs no such advice.

    Args:
        subject, run, hardware, workload: what is planned.
        largest: clips of the largest forward pass that fits, at most a rank's whole share.
    """
    if run.recipe.training.gradient_checkpointing is not True or not largest:
        return None
    own = run.recipe.training.micro_batch_size
    clips = largest if own == "auto" else min(own, largest)
    now = make_plan(subject, run, hardware, workload, micro_batch_size=clips)
    then = make_plan(subject, run, hardware, workload, micro_batch_size=clips, checkpointing=False)
    while then.lacking(hardware) and clips > 1:
        clips //= 2
        then = make_plan(subject, run, hardware, workload, micro_batch_size=clips, checkpointing=False)
    if then.lacking(hardware):
        return None
    seconds = [step_seconds(plan, run, hardware, subject.weights) for plan in (now, then)]
    saved = 1 - seconds[1] / seconds[0]
    return NeedlessRecomputation(clips, then.total / GIB, saved) if saved >= WORTH else None
