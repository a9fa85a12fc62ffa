"""The micro-batches that the plan says to fit a GPU, with their speeds: where a rehearsal starts."""

from __future__ import annotations

import math
from dataclasses import replace

from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange, on_rank_0
from toolkit.corpus.packed import Split
from toolkit.cpu.allocator import keeps_memory
from toolkit.errors import UserError
from toolkit.fitting.memory_limits import memory_limit
from toolkit.planning.cpu_plan import make_cpu_plan
from toolkit.planning.hardware import Hardware
from toolkit.planning.recomputation import needless_recomputation
from toolkit.planning.sizes.choices import Candidate, Planned, families
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.shapes import Lengths, Limits, heaviest
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun


def planned_candidates(
    resolved: ResolvedRun, ranks: Ranks, lengths: Lengths, split: Split, room: int
) -> list[Candidate]:
    """The micro-batches whose heaviest fit, the largest first, those with activations that are kept before the others.

    Args:
        resolved, ranks: the run.
        lengths: of its clips.
        split: that it trains on.
        room: bytes that torch may have on the GPU, model and optimizer states included.

    Returns:
        the smallest where the plan finds that none fits, and all of unknown speed where it cannot say: a rehearsal
        decides.
    """
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    hardware = Hardware(resolved.world_size, room, nodes if resolved.world_size % nodes == 0 else 1)
    runs = [resolved.recomputing(recomputes) for recomputes in resolved.may_recompute]
    every = [families(run, lengths)[0] for run in runs]
    found: list[Candidate] = []
    try:
        subject, epoch = Subject.of(resolved.recipe), FirstEpoch(resolved, split)
        workload = _workload(resolved, lengths, lengths.longest)
        for run in runs:
            own = (hardware, lengths, epoch, workload, lambda plan: plan.phases["step"] - hardware.context <= room)
            found += Planned(subject, run, *own).candidates()
    except UserError:
        return [one for family in every for one in family]  # a model that cannot be traced
    return found or [family[-1] for family in every]


def keeps_activations(resolved: ResolvedRun, ranks: Ranks, lengths: Lengths, limits: Limits) -> bool:
    """Whether the activations of a rank on CPUs are kept: as the recipe says, of ``auto`` where the plan finds room.

    All ranks call this. Where addresses are limited, or the model cannot be traced, the plan does not know.
    """
    if len(resolved.may_recompute) == 1:
        return not resolved.may_recompute[0]
    limit = memory_limit(ranks.local_world_size)
    keeps = keeps_memory()

    def needed() -> float:
        try:
            subject = Subject.of(resolved.recipe)
            plans = [
                make_cpu_plan(
                    subject,
                    resolved,
                    _workload(resolved, lengths, shape.frames),
                    micro_batch_size=shape.clips,
                    checkpointing=False,
                    keeps=keeps,
                )
                for shape in heaviest(limits, lengths)
            ]
            return max(plan.total for plan in plans)
        except UserError:
            return math.inf

    most = on_rank_0(needed)
    return all(exchange(limit.address_space is None and most <= limit.resident))


def room_for_activations(resolved: ResolvedRun, lengths: Lengths, limits: Limits, room: int) -> str | None:
    """What a run would gain that recomputes its activations and has the room to keep them, in a line; else None.

    Args:
        resolved, lengths, room: as for :func:`planned_candidates`.
        limits: of its micro-batches.
    """
    if resolved.recipe.training.gradient_checkpointing is not True:
        return None
    shape = max(heaviest(limits, lengths), key=lambda shape: shape.clips * shape.frames)
    hardware = Hardware(gpus=resolved.world_size, gpu_memory=room)
    hardware = replace(hardware, gpu_memory=room + int(hardware.context))
    workload = _workload(resolved, lengths, shape.frames)
    try:
        found = needless_recomputation(Subject.of(resolved.recipe), resolved, hardware, workload, shape.clips)
    except UserError:
        return None  # a model that cannot be traced
    return found.in_words() if found else None


def _workload(resolved: ResolvedRun, lengths: Lengths, frames: int) -> Workload:
    """The longest text behind clips of so many frames."""
    tokens = lengths.most_tokens(resolved.recipe)
    return Workload(frames, tokens, frames, ((1, lengths.longest),), None, "")
