"""On CPUs: the micro-batches that are computed fastest, of those that fit the memory that is there.

Whole steps are compared: the micro-batches into which a size divides the steps of the first epoch, padding included,
by the seconds that passes of so many padded frames take (``pace.py``). A larger size pads more, which passes over
clips of one length do not show.

A rehearsal must not cost much more than the steps that it saves. So few sizes are timed, by passes over clips of
typical length, and those between them are on the line. The passes show that the next one fits, and a step over the
heaviest micro-batches of the size that is chosen (``bounds.py``); whole steps are taken only where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from toolkit.cluster.rendezvous import exchange
from toolkit.corpus.packed import Split
from toolkit.fitting.hardware import GIB
from toolkit.fitting.pace import Pace
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.fitting.stage import Stage, nothing_fits
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.shapes import Shape, heaviest, limits_of, sizes, typical
from toolkit.recipe.resolve import ResolvedRun

# Of the best speed: a smaller micro-batch that reaches it needs less memory.
AS_FAST = 0.99
FEW = 8  # clips of typical length, at most, in the pass by which a rehearsal begins to look for the fastest
# Clips of a rank's share of a step, beside which a third pass of either of the first two sizes costs little.
MANY = 32


class _NotShownToFitError(Exception):
    """Nothing shows that a pass fits the memory that is there."""


def fastest(stage: Stage, resolved: ResolvedRun, split: Split) -> tuple[int, str]:
    """The size of those that fit by which the steps of the first epoch are computed fastest, and why."""
    candidates = sorted(sizes(stage.lengths.share))
    warmed = stage.rehearsal.passes(_typical(stage, candidates[0]))
    if problem := stage.agreed(warmed, warmed.problem)[1]:
        raise nothing_fits(resolved, problem)
    epoch, pace, largest = FirstEpoch(resolved, split), Pace(), None
    try:
        speeds = _speeds(stage, candidates, epoch, pace, shown_to_fit=True)
    except _NotShownToFitError:
        if pace.has_any:
            stage.rehearsal.close()  # steps of the smallest sizes show their growth only where nothing larger was
        largest = _largest_by_growth(stage, resolved, candidates)
        speeds = _speeds(stage, [size for size in candidates if size <= largest], epoch, Pace(), shown_to_fit=False)
    chosen = smallest_as_fast(speeds) if speeds else candidates[0]
    size, takes, measured = _largest_that_fits(stage, resolved, candidates, chosen, largest)
    gib = max(one.resident for one in measured) / GIB
    tried = ", ".join(f"{speed:.3g} with {number}" for number, speed in speeds.items())
    limit = largest if size == chosen else size
    most = f"; more than {limit} of the longest clips do not fit" if limit not in (None, candidates[-1]) else ""
    return size, (
        f"as many frames as {_words(size)} are computed fastest (clips/s of a rank by a rehearsal, with the "
        f"padding of the first epoch: {tried}); "
        f"the heaviest {takes} {gib:.2f} of {stage.limit.resident / GIB:.2f} GiB of a rank{most}"
    )


def _largest_that_fits(
    stage: Stage, resolved: ResolvedRun, candidates: list[int], chosen: int, largest: int | None
) -> tuple[int, str, list[Measured]]:
    """The largest size up to ``chosen`` whose steps fit, how that is known, and what they take.

    Args:
        stage, resolved: of the run.
        candidates: sizes, ascending.
        chosen: one of them.
        largest: what fits by the growth of memory; None = that was not measured.
    """
    smaller = [size for size in candidates if size <= chosen]
    measured, problem = stage.agreed(*stage.at_most(_heaviest(stage, chosen)))
    if not problem:
        return chosen, "takes at most", measured
    if largest is None:
        # What is kept of freed memory shows in a long run alone: a step shows no more than a traced pass.
        if traced := _largest_traced(stage, smaller if stage.keeps else [chosen]):
            return traced[0], "takes at most", traced[1]
        stage.rehearsal.close()
        largest = _largest_by_growth(stage, resolved, candidates)
    for size in reversed([size for size in smaller if size <= largest]):
        measured, problem = stage.agreed(*stage.at_most(_heaviest(stage, size)))
        if not problem:
            return size, "takes at most", measured
        measured, problem = stage.agreed(*stage.step(limits_of(size, stage.lengths), recomputes=resolved.recomputes))
        if not problem:
            return size, "took", measured
        stage.rehearsal.close()  # the largest memory of a process never shrinks
    raise nothing_fits(resolved, problem)


def _largest_traced(stage: Stage, candidates: list[int]) -> tuple[int, list[Measured]] | None:
    """The largest of ascending sizes whose steps fit by traced passes, if any, and what they take."""
    found, low, high = None, 0, len(candidates)
    middle = high - 1  # mostly it fits
    while low < high:
        measured, problem = stage.agreed(*stage.traced(_heaviest(stage, candidates[middle])))
        if problem:
            high = middle
        else:
            found, low = (candidates[middle], measured), middle + 1
        middle = (low + high) // 2
    return found


def _typical(stage: Stage, size: int) -> Shape:
    return typical(limits_of(size, stage.lengths), stage.lengths)


def _heaviest(stage: Stage, size: int) -> list[Shape]:
    return heaviest(limits_of(size, stage.lengths), stage.lengths)


def _of_each_shape(stage: Stage, candidates: Sequence[int]) -> list[list[int]]:
    """Ascending sizes, those together whose passes over clips of typical length are the same: one pass times them."""
    groups: dict[Shape, list[int]] = {}
    for size in candidates:
        groups.setdefault(_typical(stage, size), []).append(size)
    return list(groups.values())


def _speeds(
    stage: Stage, candidates: Sequence[int], epoch: FirstEpoch, pace: Pace, *, shown_to_fit: bool
) -> dict[int, float]:
    """Clips a second of a rank in the epoch, by size, of the sizes that were timed; the fastest one is among them.

    Two passes, of a few clips and of twice as many, say how long any other takes; the size that is fastest by that is
    timed, and then what is fastest by the three, until that was timed. A pass that decides is taken twice, those of
    the first two sizes thrice where steps are large: the first one of a size gets its memory from the system, and other
    processes make a pass longer, never shorter.

    Args:
        stage: of the rank.
        candidates: sizes, ascending.
        epoch: whose steps are compared.
        pace: gets what is timed.
        shown_to_fit: whether a pass is taken only where those before show that it fits.

    Raises:
        _NotShownToFitError: a pass was not taken for that reason.
    """
    groups = _of_each_shape(stage, candidates)
    timed: list[list[int]] = []
    failed: list[list[int]] = []

    @cache
    def padded(size: int) -> NDArray[np.int64]:
        return epoch.padded_frames(limits_of(size, stage.lengths))

    def speed(size: int) -> float:
        return epoch.clips / pace.seconds(padded(size))

    def time(group: list[int]) -> None:
        shape = _typical(stage, group[0])
        if shown_to_fit and group not in timed and stage.agreed(*stage.at_most([shape]))[1]:
            if not (stage.keeps and timed):
                raise _NotShownToFitError
            failed.append(group)  # as in _largest_that_fits, no step would show more
            return
        own = stage.rehearsal.passes(shape)
        measured, problem = stage.agreed(own, own.problem)
        if problem:
            failed.append(group)
            return
        pace.add(shape, [one.seconds for one in measured])
        timed.append(group)
        best = max(group, key=speed)
        stage.show(f"{speed(best):.3g} clips/s of a rank with as many frames as {_words(best)}")

    def fastest_group() -> list[int]:
        by_size = {size: speed(size) for group in groups if group not in failed for size in group}
        return next(group for group in groups if smallest_as_fast(by_size) in group)

    often = 3 if stage.lengths.share >= MANY else 2
    for group in _first_two(stage, groups) * often:
        if group not in failed:
            time(group)
    while timed and (best := fastest_group()) not in timed:
        time(best)
        if best in timed and fastest_group() != best:
            time(best)
    return {size: speed(size) for group in groups if group in timed for size in group}


def _first_two(stage: Stage, groups: list[list[int]]) -> list[list[int]]:
    """The largest group whose passes have a few clips, and the next with twice as many, if any, else a neighbour."""
    clips = [_typical(stage, group[0]).clips for group in groups]
    first = max((number for number, count in enumerate(clips) if count <= FEW), default=0)
    twice = [number for number, count in enumerate(clips) if count >= 2 * clips[first]]
    second = twice[0] if twice else first - 1 if first else len(groups) - 1
    return [groups[number] for number in sorted({first, second})]


def _largest_by_growth(stage: Stage, resolved: ResolvedRun, candidates: list[int]) -> int:
    """The largest size whose memory, by that of the two smallest, is within the limit.

    A size that is far too large is never tried on CPUs: the kernel might end another process.
    """
    first, own_problem = stage.step(limits_of(candidates[0], stage.lengths), recomputes=resolved.recomputes)
    if problem := stage.agreed(first, own_problem)[1]:
        raise nothing_fits(resolved, problem)
    if len(candidates) == 1:
        return candidates[0]
    second, own_problem = stage.step(limits_of(candidates[1], stage.lengths), recomputes=resolved.recomputes)
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


def _words(size: int) -> str:
    return "one of the longest clips has" if size == 1 else f"{size} of the longest clips have"
