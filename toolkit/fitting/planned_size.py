"""The largest size of micro-batches that the plan says to fit a GPU: where a rehearsal starts."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.batching.lengths import rung_above
from toolkit.errors import UserError
from toolkit.fitting.shapes import Lengths, heaviest, limits_of
from toolkit.planning.hardware import Hardware
from toolkit.planning.plan import Subject, make_plan
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
    # Texts count as a token for each byte: the plan needs no tokenizer.
    tokens = min(recipe.training.max_target_tokens, 1 + max(len(text.encode()) for text in lengths.long_texts))
    tokens = rung_above(lengths.token_rungs, tokens)
    hardware = Hardware(gpus=resolved.world_size, gpu_memory=room)

    def fits(subject: Subject, size: int) -> bool:
        for shape in heaviest(limits_of(size, lengths), lengths):
            workload = Workload(shape.frames, tokens, shape.frames, ((1, lengths.longest),), None, "")
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
