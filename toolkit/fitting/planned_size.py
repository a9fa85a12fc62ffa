"""The micro-batches that the plan says to fit a GPU, with their speeds: where a rehearsal starts."""

from __future__ import annotations

from dataclasses import replace

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Split
from toolkit.errors import UserError
from toolkit.planning.hardware import Hardware
from toolkit.planning.recomputation import needless_recomputation
from toolkit.planning.sizes.choices import Candidate, Planned
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.shapes import Lengths, Limits, heaviest, limits_of, sizes
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun


def planned_candidates(
    resolved: ResolvedRun, ranks: Ranks, lengths: Lengths, split: Split, room: int
) -> list[Candidate]:
    """The micro-batches whose heaviest fit, the largest first.

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
    every = [Candidate(size, limits_of(size, lengths)) for size in sizes(lengths.share)]
    try:
        planned = Planned(
            Subject.of(resolved.recipe),
            resolved,
            hardware,
            lengths,
            FirstEpoch(resolved, split),
            Workload(1, 1, 1, ((1, lengths.longest),), None, ""),
            lambda plan: plan.phases["step"] - hardware.context <= room,
        )
        return planned.candidates() or every[-1:]
    except UserError:
        return every  # a model that cannot be traced


def room_for_activations(resolved: ResolvedRun, lengths: Lengths, limits: Limits, room: int) -> str | None:
    """What a run would gain that recomputes its activations and has the room to keep them, in a line; else None.

    Args:
        resolved, lengths, room: as for :func:`planned_candidates`.
        limits: of its micro-batches.
    """
    if not resolved.recipe.training.gradient_checkpointing:
        return None
    shape = max(heaviest(limits, lengths), key=lambda shape: shape.clips * shape.frames)
    hardware = Hardware(gpus=resolved.world_size, gpu_memory=room)
    hardware = replace(hardware, gpu_memory=room + int(hardware.context))
    workload = Workload(
        shape.frames, lengths.most_tokens(resolved.recipe), shape.frames, ((1, lengths.longest),), None, ""
    )
    try:
        found = needless_recomputation(Subject.of(resolved.recipe), resolved, hardware, workload, shape.clips)
    except UserError:
        return None  # a model that cannot be traced
    return found.in_words() if found else None
