"""How the clips of an optimizer step are shared out over ranks and forward passes.

``training.micro_batch_size`` is an upper limit, so any number of ranks up to the number of clips can share them. Ranks'
shares differ by at most one clip, and so do micro-batches.
"""

from __future__ import annotations


def num_micro_batches(clips: int, world_size: int, limit: int) -> int:
    """Forward passes of each rank for the clips of one optimizer step, each of at most ``limit`` clips."""
    largest_share = -(-clips // world_size)
    return -(-largest_share // limit)


def micro_batch_sizes(clips: int, world_size: int, limit: int) -> tuple[int, int]:
    """Clips in the smallest and in the largest micro-batch of all ranks; arguments as for ``num_micro_batches``."""
    seats = world_size * num_micro_batches(clips, world_size, limit)
    return clips // seats, -(-clips // seats)


def batch_in_words(clips: int, world_size: int, limit: int, frames: int | None) -> str:
    """The arithmetic of a step in words: ``128 clips = 8 ranks x 1 micro-batch of 16``.

    ``frames`` are the most padded frames in a micro-batch; None = no limit.
    """
    ranks = _counted(world_size, "rank")
    if frames is not None:
        return f"{clips} clips over {ranks}, in micro-batches of at most {limit} clips and {frames} frames"
    smallest, largest = micro_batch_sizes(clips, world_size, limit)
    sizes = f"{largest}" if smallest == largest else f"{smallest} or {largest}"
    return (
        f"{clips} clips = {ranks} x {_counted(num_micro_batches(clips, world_size, limit), 'micro-batch')} of {sizes}"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"
