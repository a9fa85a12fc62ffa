"""Of several people in a clip the signer: the one whose landmarks are seen most, followed where the list changes.

Detectors list the people of each frame anew, so that the second may be the first in the next frame. A person keeps its
place in the list as long as it stays near where it was; when another is found there instead, and the first is found
elsewhere, it is followed. People who stand closer to each other than a quarter of their size are not told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_NEAR = 0.25  # of a person's size
_MOST_FOLLOWED = 32
_MOST_LISTED = 64  # detectors list those first of whom they are surest


@dataclass(frozen=True)
class People:
    """The people that each frame lists.

    Attributes:
        score: how well each is seen, [frames, people]; 0 where nobody is in that place of the list.
        middle: the middle of their points, [frames, people, 2].
        reach: how far they may move from one frame to the next, [frames, people].
    """

    score: FloatArray
    middle: FloatArray
    reach: FloatArray


def look_at(values: FloatArray, confidence: FloatArray, seen: BoolArray) -> People:
    """Where people are.

    Args:
        values: coordinates [frames, people, points, 2 or more].
        confidence: [frames, people, points].
        seen: which points have a place, [frames, people, points].
    """
    with np.errstate(all="ignore"):
        # What is seen at all counts a little, so that a person of tiny scores is there, too.
        score = np.where(seen, confidence.clip(1e-6, 1), 0).sum(axis=2)
        flat, where = values[..., :2], seen[..., None]
        low = np.min(flat, axis=2, where=where, initial=np.inf)
        high = np.max(flat, axis=2, where=where, initial=-np.inf)
        middle = np.where(where, flat, 0).sum(axis=2) / np.maximum(where.sum(axis=2), 1)
        reach = _NEAR * (high - low).max(axis=2)
    return People(*(np.asarray(found, np.float32) for found in (score, middle, reach)))


def line_up(counts: Sequence[int], frame: Callable[[int], tuple[FloatArray, FloatArray]]) -> People:
    """Where people are in frames that list different numbers of them, the places of shorter lists left empty.

    Args:
        counts: how many people each frame lists.
        frame: of a frame the coordinates [people, points, 2 or more] and confidences [people, points].
    """
    # One frame of a crowd among many of nobody must not cost as if all were crowds.
    affordable = 16 * (sum(counts) + (1 << 16)) // len(counts)
    most = max(min(max(counts), _MOST_LISTED, affordable), 1)
    score, reach = np.zeros((2, len(counts), most), np.float32)
    middle = np.zeros((len(counts), most, 2), np.float32)
    for number, count in enumerate(counts):
        here = slice(min(count, most))
        if count:
            values, confidence = (found[None, here] for found in frame(number))
            with np.errstate(all="ignore"):
                seen = (confidence > 0) & (confidence < np.inf) & np.isfinite(values).all(axis=3)
                seen &= (values != 0).any(axis=3)
            found = look_at(values, confidence, seen)
            score[number, here], reach[number, here], middle[number, here] = found.score, found.reach, found.middle
    return People(score, middle, reach)


def follow_signer(people: People) -> npt.NDArray[np.intp]:
    """Where in the list of each frame the signer stands, [frames]; -1 where the signer is in no place of the list."""
    score, middle, reach = people.score, people.middle, people.reach
    there = score > 0
    if there.shape[1] > _MOST_FOLLOWED:
        # A crowd: only the places of the list that hold somebody most often.
        kept = np.sort(np.argsort(-there.sum(axis=0), kind="stable")[:_MOST_FOLLOWED])
        found = follow_signer(People(score[:, kept], middle[:, kept], reach[:, kept]))
        return np.where(found >= 0, kept[found], -1)
    places = np.full(there.shape, -1, np.intp)  # of each person in each frame; the last columns may be nobody's
    last = np.full((int(there.sum(axis=1).max(initial=1)), 2), np.nan)  # no more people than were seen together
    for frame in range(len(there)):
        taken = _assign(last, middle[frame], reach[frame], np.flatnonzero(there[frame]))
        for person, place in taken.items():
            places[frame, person] = place
            last[person] = middle[frame, place]
    rows = np.arange(len(there))[:, None]
    totals = np.where(places >= 0, score[rows, places], 0).sum(axis=0)
    signer: npt.NDArray[np.intp] = places[:, int(totals.argmax())]
    return signer


def _assign(
    last: npt.NDArray[np.float64], middle: FloatArray, reach: FloatArray, listed: npt.NDArray[np.intp]
) -> dict[int, int]:
    """Person -> place in the list of a frame, given where each person was last (NaN: nowhere yet)."""
    distance = np.hypot(*(last[:, None] - middle[None]).transpose(2, 0, 1))
    distance = np.where(distance <= reach, distance, np.inf)  # NaN is not near, either
    taken = {int(place): int(place) for place in listed if place < len(last) and np.isfinite(distance[place, place])}
    near = sorted(
        (distance[person, place], person, int(place))
        for place in listed
        for person in range(len(last))
        if np.isfinite(distance[person, place])
    )
    free = {int(place) for place in listed} - set(taken.values())
    for _, person, place in near:
        if person not in taken and place in free:
            taken[person] = place
            free.discard(place)
    for place in sorted(free):
        # Somebody new, or, where everybody is known, somebody who jumped: the camera may have been moved.
        left = [person for person in range(len(last)) if person not in taken]
        new = [person for person in left if np.isnan(last[person, 0])]
        candidates = new or left
        taken[place if place in candidates else candidates[0]] = place
    return taken
