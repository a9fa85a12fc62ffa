"""Whether a global batch is too small for the GPUs, and which would not be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from toolkit.planning.hardware import Hardware
from toolkit.planning.plan import PassSpeed, Plan, make_plan
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.compilation import graphs_obstacle
from toolkit.recipe.resolve import ResolvedRun

BUSY = 0.5  # share of a pass in which a GPU computes, below which its batch is too small
LARGEST_FACTOR = 64


@dataclass(frozen=True)
class IdleGpus:
    """GPUs that wait for launches most of the time, though a forward pass has all clips that a rank gets.

    Attributes:
        clips: of a rank.
        busy: share of a pass in which a GPU computes, by the model of the hardware; 0..1.
        global_batch_size: one that would keep it busy, or as busy as its memory allows; None = no larger one fits.
        learning_rate: for that batch; it grows by the square root of the batch (Malladi et al. 2022, "On the SDEs and
            Scaling Rules for Adaptive Gradient Algorithms", arXiv:2205.10287).
        then_busy: the share with it.
        graphs: whether passes could be CUDA graphs instead, which need hardly a launch.
    """

    clips: int
    busy: float
    global_batch_size: int | None = None
    learning_rate: float | None = None
    then_busy: float | None = None
    graphs: bool = False

    def in_words(self) -> str:
        """What is idle, and what would not be, in a line."""
        clips = "one clip" if self.clips == 1 else f"{self.clips} clips"
        problem = (
            f"with {clips} a rank the GPUs compute for {self.busy:.0%} of a pass, by the model of the hardware, and "
            "wait for launches otherwise"
        )
        graphs = "; training.compile=graphs has hardly any" if self.graphs else ""
        if self.global_batch_size is None:
            return f"{problem}{graphs}; fewer GPUs would be as fast"
        return (
            f"{problem}{graphs}; with training.global_batch_size={self.global_batch_size} "
            f"training.learning_rate={self.learning_rate:.2g} for {self.then_busy:.0%}"
        )


def idle_gpus(
    subject: Subject, run: ResolvedRun, hardware: Hardware, workload: Workload, largest: int
) -> IdleGpus | None:
    """Whether GPUs would be idle because of the global batch; None where they are not, or where memory is what limits.

    Args:
        subject, run, hardware, workload: what is planned.
        largest: clips of the largest forward pass that fits, at most a rank's whole share.
    """
    training = run.recipe.training
    if training.compile == "graphs":
        return None
    share = -(-training.global_batch_size // run.data_parallel_size)

    speed = PassSpeed.of(run, subject.weights)

    def planned(clips: int) -> Plan:
        return make_plan(subject, run, hardware, workload, micro_batch_size=clips)

    def busy(plan: Plan) -> float:
        return speed.products(plan.pass_) / speed.seconds(plan.pass_)

    now = busy(planned(share)) if largest >= share else BUSY
    if now >= BUSY:
        return None
    found = IdleGpus(share, now, graphs=graphs_obstacle(run.recipe, run.deepspeed) is None)
    factor = 2
    while factor <= LARGEST_FACTOR and (found.then_busy or 0.0) < BUSY:
        plan = planned(share * factor)
        if plan.lacking(hardware):
            break
        rate = training.learning_rate * math.sqrt(factor)
        found = replace(
            found, global_batch_size=training.global_batch_size * factor, learning_rate=rate, then_busy=busy(plan)
        )
        factor *= 2
    return found
