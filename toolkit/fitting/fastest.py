"""On CPUs: the micro-batches that are computed fastest, of those that fit the memory that is there.

Whole steps are compared: the micro-batches into which a size divides the steps of the first epoch, padding included,
by the seconds that passes of so many padded frames take (``padding.py``). A larger size pads more, which passes over
clips of one length do not show.

A rehearsal must not cost much more than the steps that it saves. So a size is timed by one pass over clips of typical
length, larger sizes only while they are faster, and a whole step over the heaviest micro-batches is taken only where
the passes do not show that any such step fits (``bounds.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from toolkit.cluster.rendezvous import exchange
from toolkit.corpus.packed import Split
from toolkit.fitting.hardware import GIB
from toolkit.fitting.padding import FirstEpoch, Pace
from toolkit.fitting.shapes import Shape, limits_of, sizes, typical
from toolkit.fitting.stage import Stage, nothing_fits
from toolkit.recipe.resolve import ResolvedRun

# Of the best speed: a smaller micro-batch that reaches it needs less memory.
AS_FAST = 0.97
FEW = 8  # clips of typical length in the pass by which a rehearsal begins to look for the fastest


def fastest(stage: Stage, resolved: ResolvedRun, split: Split) -> tuple[int, str]:
    """The size of those that fit by which the steps of the first epoch are computed fastest, and why."""
    candidates = sorted(sizes(stage.lengths.share))
    warmed = stage.rehearsal.passes(_typical(stage, candidates[0]))
    if problem := stage.agreed(warmed, warmed.problem)[1]:
        raise nothing_fits(resolved, problem)
    _, problem = stage.agreed(*stage.at_most(candidates[-1]))
    largest = _largest_by_growth(stage, resolved, candidates) if problem else candidates[-1]
    groups = _of_each_shape(stage, [size for size in candidates if size <= largest])
    speeds = _speeds(stage, _doubling(groups), FirstEpoch(resolved, split))
    chosen = smallest_as_fast(speeds) if speeds else candidates[0]
    fits_all = largest == candidates[-1]
    for size in reversed([size for size in candidates if size <= chosen]):
        takes, (measured, problem) = "takes at most", stage.agreed(*stage.at_most(size))
        if problem:
            takes, (measured, problem) = "took", stage.agreed(*stage.step(size))
        if not problem:
            gib = max(one.resident for one in measured) / GIB
            tried = ", ".join(f"{speed:.3g} with {number}" for number, speed in speeds.items())
            most = "" if fits_all else f"; more than {max(size, largest)} of the longest clips do not fit"
            return size, (
                f"as many frames as {_words(size)} are computed fastest (clips/s of a rank by a rehearsal, with the "
                f"padding of the first epoch: {tried}); "
                f"the heaviest {takes} {gib:.2f} of {stage.limit.resident / GIB:.2f} GiB of a rank{most}"
            )
        largest, fits_all = min(largest, size - 1), False
        stage.rehearsal.close()  # the largest memory of a process never shrinks
    raise nothing_fits(resolved, problem)


def _typical(stage: Stage, size: int) -> Shape:
    return typical(limits_of(size, stage.lengths), stage.lengths)


def _of_each_shape(stage: Stage, candidates: Sequence[int]) -> list[list[int]]:
    """Ascending sizes, those together whose passes over clips of typical length are the same: one pass times them."""
    groups: dict[Shape, list[int]] = {}
    for size in candidates:
        groups.setdefault(_typical(stage, size), []).append(size)
    return list(groups.values())


def _speeds(stage: Stage, tried: list[list[int]], epoch: FirstEpoch) -> dict[int, float]:
    """Clips a second of a rank in the epoch, by size: from a few clips on upwards while larger sizes are faster.

    Where the first of them is not faster, downwards while smaller ones are about as fast. A group of sizes, of which
    the fastest counts, is timed once. Before a smaller one counts as about as fast, both are timed again: the first
    pass of a size gets its memory from the system, and other processes make a pass longer, never shorter.
    """
    pace, timed = Pace(), dict[int, list[int]]()

    @cache
    def padded(size: int) -> NDArray[np.int64]:
        return epoch.padded_frames(limits_of(size, stage.lengths))

    def speed(size: int) -> float:
        return epoch.clips / pace.seconds(padded(size))

    def time(group: list[int]) -> bool:
        """Time a group; whether it could be computed."""
        shape = _typical(stage, group[0])
        own = stage.rehearsal.passes(shape)
        measured, problem = stage.agreed(own, own.problem)
        if problem:
            return False
        pace.add(shape, max(one.seconds for one in measured))
        timed[group[0]] = group
        best = max(group, key=speed)
        stage.show(f"{speed(best):.3g} clips/s of a rank with as many frames as {_words(best)}")
        return True

    def pays(larger: list[int], smaller: list[int]) -> bool:
        return AS_FAST * max(map(speed, larger)) > max(map(speed, smaller))

    def larger_pays(larger: list[int], smaller: list[int]) -> bool:
        return pays(larger, smaller) or (time(larger) and time(smaller) and pays(larger, smaller))

    start = max((number for number, group in enumerate(tried) if _typical(stage, group[0]).clips <= FEW), default=0)
    best = tried[start]
    if not time(best):
        return {}
    for group in tried[start + 1 :]:
        if not time(group) or not larger_pays(group, best):
            break
        best = group
    for group in reversed(tried[:start]) if best == tried[start] else []:
        if not time(group) or larger_pays(best, group):
            break
        best = max(best, group, key=lambda known: max(map(speed, known)))
    return {size: speed(size) for group in timed.values() for size in group}


def _largest_by_growth(stage: Stage, resolved: ResolvedRun, candidates: list[int]) -> int:
    """The largest size whose memory, by that of the two smallest, is within the limit.

    A size that is far too large is never tried on CPUs: the kernel might end another process.
    """
    first, own_problem = stage.step(candidates[0])
    if problem := stage.agreed(first, own_problem)[1]:
        raise nothing_fits(resolved, problem)
    if len(candidates) == 1:
        return candidates[0]
    second, own_problem = stage.step(candidates[1])
    if stage.agreed(second, own_problem)[1]:
        stage.rehearsal.close()
        return candidates[0]
    most = candidates[1] + min(
        room * (candidates[1] - candidates[0]) / growth if growth > 0 else candidates[-1]
        for growth, room in (
            (second.resident - first.resident, stage.limit.resident - second.resident),
            (second.address_space - first.address_space, (stage.limit.address_space or 2**63) - second.address_space),
        )
    )
    return max(size for size in candidates if size <= max(candidates[0], min(exchange(most))))


def smallest_as_fast(speeds: dict[int, float]) -> int:
    """The smallest size that is about as fast as the fastest: it needs less memory."""
    return min(size for size, speed in speeds.items() if speed >= AS_FAST * max(speeds.values()))


def _doubling(groups: Sequence[list[int]]) -> list[list[int]]:
    """Of ascending groups those whose largest size is at least twice that of the one before, and the last."""
    chosen: list[list[int]] = []
    for group in groups:
        if not chosen or group[-1] >= 2 * chosen[-1][-1]:
            chosen.append(group)
    return chosen if chosen[-1] == groups[-1] else [*chosen, groups[-1]]


def _words(size: int) -> str:
    return "one of the longest clips has" if size == 1 else f"{size} of the longest clips have"
