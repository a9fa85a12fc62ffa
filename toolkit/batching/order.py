"""Assign clips to batches: one global order, which is partitioned over any number of ranks.

The order of an epoch depends on the lengths, the seed and the epoch alone. The clips of an optimizer step are therefore
the same on 1 or 64 ranks, and a run that stopped at step ``k`` resumes at step ``k`` on any hardware.

A filler is a clip that completes a batch and must not count. It is written ``~i``: the content of clip ``i``, weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from toolkit.batching.lengths import rung_above
from toolkit.recipe.batches import num_micro_batches

Indices = NDArray[np.int64]

# Clips are sorted by length within pools of at most this many global batches: with 100 about 2.4 % of the frames of a
# batch of 32 are padding (log-normal lengths), and larger pools gain little. A small corpus has smaller pools, at least
# two, because one pool over the whole corpus would put nearly the same clips into one batch in every epoch.
POOL_BATCHES = 100
MIN_POOLS = 2

# Lengths are changed at random by up to this share before sorting, so that batches differ from epoch to epoch.
LENGTH_JITTER = 0.02

# Where texts stand in one sequence with their clips, clips of similar length are sorted by text: so large a share of a
# pool at a time. Larger ones pad the frames more, smaller ones the texts.
TEXT_SORTED_SHARE = 0.06


def steps_per_epoch(num_clips: int, global_batch_size: int) -> int:
    """Number of optimizer steps in an epoch; the last one may hold fewer clips."""
    return -(-num_clips // global_batch_size)


def epoch_order(
    frames: NDArray[np.integer],
    global_batch_size: int,
    seed: int,
    epoch: int,
    texts: NDArray[np.integer] | None = None,
) -> list[Indices]:
    """Assign every clip to exactly one global batch of clips of similar length.

    Args:
        frames: length of each clip, [clips].
        global_batch_size: clips of one optimizer step, over all ranks.
        seed: the run's seed.
        epoch: the order differs from epoch to epoch.
        texts: sizes of the texts in any unit, [clips], where similar ones shall meet; None where they do not count.

    Returns:
        an array of clip indices for each step, longest clip first; full batches in random order, then a partial one.
    """
    num_clips = len(frames)
    rng = np.random.default_rng((seed, epoch))
    num_full, num_left = divmod(num_clips, global_batch_size)
    num_steps = steps_per_epoch(num_clips, global_batch_size)
    num_pools = max(-(-num_steps // POOL_BATCHES), min(MIN_POOLS, num_steps))

    shuffled = rng.permutation(num_clips)
    pool = np.arange(num_clips) // global_batch_size * num_pools // num_steps
    blurred = np.asarray(frames)[shuffled] * rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, num_clips)
    # One sort for all pools: the pool number is weighted more than any length.
    order = shuffled[np.argsort(pool * (2.0 * float(blurred.max()) + 1.0) - blurred)]

    partial = order[:0]
    if num_left:
        # Otherwise the partial batch would always have the shortest clips of the last pool.
        start = global_batch_size * int(rng.integers(-(-(num_pools - 1) * num_steps // num_pools), num_full + 1))
        partial = order[start : start + num_left]
        order, pool = (np.delete(values, slice(start, start + num_left)) for values in (order, pool))
    if texts is not None and len(order):
        order = _similar_texts_together(order, pool, np.asarray(frames), np.asarray(texts), global_batch_size)
    order = np.concatenate([order, partial])
    batches = [order[start : start + global_batch_size] for start in range(0, num_clips, global_batch_size)]
    arrangement = rng.permutation(num_full)
    return [batches[i] for i in arrangement] + batches[num_full:]


def _similar_texts_together(
    order: Indices,
    pool: NDArray[np.integer],
    frames: NDArray[np.integer],
    texts: NDArray[np.integer],
    global_batch_size: int,
) -> Indices:
    """Full batches of clips, sorted by pool and length, so arranged that those of a batch have similar texts as well.

    ``pool`` is that of each of ``order``. Each batch has its longest clip first.
    """
    first = np.searchsorted(pool, pool)  # of each clip's pool
    batches = np.bincount(pool)[pool] // global_batch_size
    group = (np.arange(len(order)) - first) // (
        global_batch_size * np.maximum(1, np.round(TEXT_SORTED_SHARE * batches).astype(np.int64))
    )
    order = order[np.lexsort((-texts[order], group, pool))]
    batch = np.arange(len(order)) // global_batch_size
    return order[np.lexsort((-frames[order], batch))]


def micro_batches(
    global_batch: Sequence[int] | Indices, rank: int, world_size: int, micro_batch_size: int
) -> list[Indices]:
    """One rank's share of a global batch, in as few micro-batches as the limit allows.

    The batch is sorted by length, and consecutive clips go to the ranks of one accumulation step: micro-batches have
    little padding, and ranks wait little for each other. Shares of ranks differ by at most one clip, and so do
    micro-batches; a rank without a clip gets one filler.

    Args:
        global_batch: indices of clips, longest clip first.
        rank, world_size: of this process.
        micro_batch_size: most clips in a micro-batch.

    Returns:
        arrays of clip indices, on every rank the same number of them; fillers are negative (``~i``).
    """
    clips = np.asarray(global_batch, dtype=np.int64)
    accumulation_steps = num_micro_batches(len(clips), world_size, micro_batch_size)
    seats = world_size * accumulation_steps
    smaller, larger_shares = divmod(len(clips), seats)
    shares = []
    for step in range(accumulation_steps):
        seat = step * world_size + rank
        start = seat * smaller + min(seat, larger_shares)
        share = clips[start : start + smaller + (seat < larger_shares)]
        shares.append(share if len(share) else ~clips[-1:])
    return shares


def micro_batches_by_frames(
    global_batch: Sequence[int] | Indices,
    frames: NDArray[np.integer],
    rank: int,
    world_size: int,
    micro_batch_size: int,
    micro_batch_frames: int,
) -> list[Indices]:
    """One rank's share of a global batch, in as many micro-batches as a frame budget needs.

    All ranks get the same number of micro-batches. The clips of the global batch do not depend on the budget or the
    number of ranks.

    A micro-batch has ``micro_batch_size`` clips and ``micro_batch_frames`` padded frames at most; a longer clip is
    alone. ``frames`` are the lengths of all clips of the split.

    Returns:
        arrays of clip indices; fillers are negative (``~i``).
    """
    clips = np.asarray(global_batch, dtype=np.int64)
    lengths = np.maximum(np.asarray(frames)[clips], 1)
    longest_first = np.argsort(-lengths, kind="stable")
    clips, lengths = clips[longest_first], lengths[longest_first]
    starts = [0]
    while starts[-1] < len(clips):
        fitting = micro_batch_frames // int(lengths[starts[-1]])
        starts.append(min(starts[-1] + max(1, min(fitting, micro_batch_size)), len(clips)))
    # The number of micro-batches must be a multiple of the number of ranks. Splitting the largest micro-batch is
    # cheaper than adding one of fillers.
    seats = -(-(len(starts) - 1) // world_size) * world_size
    while len(starts) - 1 < min(seats, len(clips)):
        sizes = np.diff(starts)
        largest = int(np.argmax(np.where(sizes > 1, sizes * lengths[starts[:-1]], -1)))
        starts.insert(largest + 1, starts[largest] + int(sizes[largest] + 1) // 2)
    batches = [clips[start:end] for start, end in pairwise(starts)]
    batches += [~clips[-1:]] * (seats - len(batches))
    return batches[rank::world_size]


def evaluation_order(frames: NDArray[np.integer], batch_frames: int, rungs: Sequence[int] = ()) -> list[Indices]:
    """All clips, longest first, in batches of at most ``batch_frames`` padded frames (at least one clip each).

    Batches are padded to their longest clip, or to one of ``rungs``.

    The longest clips are first so that a batch that does not fit into memory fails at once and not after an hour. The
    batches do not depend on the number of ranks, so neither do the outputs.
    """
    lengths = np.asarray(frames)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        clips = max(1, batch_frames // max(1, rung_above(rungs, int(lengths[order[start]]))))
        batches.append(order[start : start + clips])
        start += clips
    return batches


def evaluation_shapes(
    frames: NDArray[np.integer], batch_frames: int, rungs: Sequence[int] = ()
) -> set[tuple[int, int]]:
    """Clips and padded frames of the batches of :func:`evaluation_order`, each once."""
    order = evaluation_order(frames, batch_frames, rungs)
    return {(len(batch), rung_above(rungs, int(frames[batch[0]]))) for batch in order}


def share_of_rank(batches: Sequence[Indices], rank: int, world_size: int) -> list[Indices]:
    """Assign batches to ranks in turn; every rank gets the same number, some with a batch of one filler at the end."""
    shares = list(batches[rank::world_size])
    if len(shares) < steps_per_epoch(len(batches), world_size):
        shares.append(~batches[-1][-1:])
    return shares
