"""Of several people in a clip the signer: the one whose landmarks are seen most, followed where the list changes.

Detectors list the people of each frame anew, so that the second may be the first in the next frame. A person keeps its
place in the list as long as it stays near where it was; when another is found there instead, and the first is found
elsewhere, it is followed. People who stand closer to each other than a quarter of their size are not told apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_NEAR = 0.25  # of a person's size
_MOST_FOLLOWED = 32


def follow_signer(values: FloatArray, confidence: FloatArray, seen: BoolArray) -> npt.NDArray[np.intp]:
    """Where in the list of each frame the signer stands.

    Args:
        values: coordinates [frames, people, points, 2 or more].
        confidence: [frames, people, points].
        seen: which points have a place, [frames, people, points].

    Returns:
        [frames]; -1 where the signer is in no place of the list.
    """
    if values.shape[1] > _MOST_FOLLOWED:
        # A crowd: only the places of the list that hold somebody most often.
        kept = np.sort(np.argsort(-seen.sum(axis=(0, 2)), kind="stable")[:_MOST_FOLLOWED])
        found = follow_signer(values[:, kept], confidence[:, kept], seen[:, kept])
        return np.where(found >= 0, kept[found], -1)
    with np.errstate(all="ignore"):
        score = np.where(seen, confidence.clip(0, 1), 0).sum(axis=2)
        flat, where = values[..., :2], seen[..., None]
        low = np.min(flat, axis=2, where=where, initial=np.inf)
        high = np.max(flat, axis=2, where=where, initial=-np.inf)
        middle = np.where(where, flat, 0).sum(axis=2) / np.maximum(where.sum(axis=2), 1)
    reach = _NEAR * (high - low).max(axis=2)
    there: BoolArray = np.asarray(seen.any(axis=2))
    places = np.full(there.shape, -1, np.intp)  # of each person in each frame
    last = np.full((there.shape[1], 2), np.nan)
    for frame in range(len(values)):
        listed = np.flatnonzero(there[frame])
        taken = _assign(last, middle[frame], reach[frame], listed)
        for person, place in taken.items():
            places[frame, person] = place
            last[person] = middle[frame, place]
    rows = np.arange(len(values))[:, None]
    totals = np.where(places >= 0, score[rows, places], 0).sum(axis=0)
    signer: npt.NDArray[np.intp] = places[:, int(totals.argmax())]
    return signer


def _assign(
    last: npt.NDArray[np.float64], middle: FloatArray, reach: FloatArray, listed: npt.NDArray[np.intp]
) -> dict[int, int]:
    """Person -> place in the list of a frame, given where each person was last (NaN: nowhere yet)."""
    distance = np.hypot(*(last[:, None] - middle[None]).transpose(2, 0, 1))
    distance = np.where(distance <= reach, distance, np.inf)  # NaN is not near, either
    taken = {int(place): int(place) for place in listed if np.isfinite(distance[place, place])}
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
        # Somebody new, or somebody who jumped: the camera may have been moved.
        left = [person for person in range(len(last)) if person not in taken]
        new = [person for person in left if np.isnan(last[person, 0])]
        taken[place if place in left else (new or left)[0]] = place
    return taken
