"""Find the signer among several people in a clip: the person whose landmarks are seen most.

A detector orders the people of each frame independently, so the second may be the first in the next frame. A person
is followed by position: the same person is the one nearest to where it was in the frame before. Two people who stand
closer to each other than a quarter of their size cannot be distinguished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_NEAR = 0.25  # of a person's size


@dataclass(frozen=True)
class People:
    """The people of each frame, in the order of the file."""

    score: FloatArray  # how well each is seen, [frames, people]; 0 where there is nobody
    middle: FloatArray  # the middle of their points, [frames, people, 2]
    reach: FloatArray  # how far they may move from one frame to the next, [frames, people]


def locate_people(values: FloatArray, confidence: FloatArray, seen: BoolArray) -> People:
    """Locate people in frames that all list the same number.

    Args:
        values: coordinates [frames, people, points, 2 or more].
        confidence: [frames, people, points].
        seen: which points have a place, [frames, people, points].
    """
    with np.errstate(all="ignore"):
        # A point that is seen counts a little even with a tiny confidence.
        score = np.where(seen, confidence.clip(1e-6, 1), 0).sum(axis=2)
        flat, where = values[..., :2], seen[..., None]
        low = np.min(flat, axis=2, where=where, initial=np.inf)
        high = np.max(flat, axis=2, where=where, initial=-np.inf)
        middle = np.where(where, flat, 0).sum(axis=2) / np.maximum(where.sum(axis=2), 1)
        reach = _NEAR * (high - low).max(axis=2)
    return People(*(np.asarray(found, np.float32) for found in (score, middle, reach)))


def locate_people_in_frames(counts: Sequence[int], frame: Callable[[int], tuple[FloatArray, FloatArray]]) -> People:
    """Locate people in frames that list different numbers of them; shorter frames are filled up with nobody.

    ``frame`` gives the coordinates [people, points, 2 or more] and confidences [people, points] of a frame.
    """
    most = max([*counts, 1])
    score, reach = np.zeros((2, len(counts), most), np.float32)
    middle = np.zeros((len(counts), most, 2), np.float32)
    for number, count in enumerate(counts):
        here = slice(count)
        if count:
            values, confidence = (found[None] for found in frame(number))
            with np.errstate(all="ignore"):
                seen = (confidence > 0) & (confidence < np.inf) & np.isfinite(values).all(axis=3)
                seen &= (values != 0).any(axis=3)
            found = locate_people(values, confidence, seen)
            score[number, here], reach[number, here], middle[number, here] = found.score, found.reach, found.middle
    return People(score, middle, reach)


def follow_signer(people: People) -> npt.NDArray[np.intp]:
    """The index of the signer among the people of each frame, [frames]; -1 where the signer is not seen."""
    score, middle, reach = people.score, people.middle, people.reach
    there = score > 0
    places = np.full(there.shape, -1, np.intp)  # index of each person in each frame; the last columns may stay unused
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
    """Person -> index in a frame, given where each person was seen last (NaN: not seen yet)."""
    distance = np.hypot(*(last[:, None] - middle[None]).transpose(2, 0, 1))
    distance = np.where(distance <= reach, distance, np.inf)  # false for NaN
    taken = {int(place): int(place) for place in listed if place < len(last) and np.isfinite(distance[place, place])}
    near = sorted(
        (distance[person, place], person, int(place))
        for place in listed
        for person in np.flatnonzero(np.isfinite(distance[:, place])).tolist()
    )
    free = {int(place) for place in listed} - set(taken.values())
    for _, person, place in near:
        if person not in taken and place in free:
            taken[person] = place
            free.discard(place)
    for place in sorted(free):
        # A new person; or, if all are known, one who moved far: the camera may have been moved.
        left = [person for person in range(len(last)) if person not in taken]
        new = [person for person in left if np.isnan(last[person, 0])]
        candidates = new or left
        taken[place if place in candidates else candidates[0]] = place
    return taken
