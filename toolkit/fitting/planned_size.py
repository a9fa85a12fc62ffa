"""The largest size of micro-batches that the plan says to fit a GPU: where a rehearsal starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolkit.batching.lengths import rung_above
from toolkit.errors import UserError
from toolkit.fitting.shapes import Lengths, heaviest, limits_of
from toolkit.planning.hardware import Hardware
from toolkit.planning.plan import make_plan
from toolkit.planning.recomputation import needless_recomputation
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import ResolvedRun


def planned_size(resolved: ResolvedRun, lengths: Lengths, candidates: Sequence[int], room: int) -> int:
    """The first of the candidates whose heaviest micro-batches fit.

    Args:
        resolved: the run.
        lengths: of its clips.
        candidates: sizes, largest first.
        room: bytes that torch may have on the GPU, model and optimizer states included.

    Returns:
        the last candidate where the plan finds that none fits, and the first where it cannot say: a rehearsal decides.
    """
    recipe = resolved.recipe
    hardware = Hardware(gpus=resolved.world_size, gpu_memory=room)

    def fits(subject: Subject, size: int) -> bool:
        for shape in heaviest(limits_of(size, lengths), lengths):
            workload = _workload(resolved, lengths, shape.frames)
            plan = make_plan(subject, resolved, hardware, workload, micro_batch_size=shape.clips)
            if plan.phases["step"] - hardware.context > room:
                return False
        return True

    try:
        subject = Subject.of(recipe)
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(subject, candidates[middle]) else (middle + 1, high)
        return candidates[low]
    except UserError:
        return candidates[0]  # a model that cannot be traced


def room_for_activations(resolved: ResolvedRun, lengths: Lengths, size: int, room: int) -> str | None:
    """What a run would gain that recomputes its activations and has the room to keep them, in a line; else None.

    Args:
        resolved, lengths, room: as for :func:`planned_size`.
        size: of its micro-batches.
    """
    if not resolved.recipe.training.gradient_checkpointing:
        return None
    shape = max(heaviest(limits_of(size, lengths), lengths), key=lambda shape: shape.clips * shape.frames)
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
    # Texts count as a token for each byte: the plan needs no tokenizer.
    tokens = min(resolved.recipe.training.max_target_tokens, 1 + max(len(text.encode()) for text in lengths.long_texts))
    tokens = rung_above(lengths.token_rungs, tokens)
    return Workload(frames, tokens, frames, ((1, lengths.longest),), None, "")
