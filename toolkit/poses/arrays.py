"""Keypoints in ``.npy``, ``.npz`` and ``.pkl`` files become poses; the number of points gives their names.

A file holds one array of all frames, or a list with one array a frame, in which the number of people may vary.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from toolkit.poses.array_files import CONFIDENCE_NAMES, KEYPOINT_NAMES, read_named_arrays
from toolkit.poses.layouts import FACE_68, layouts_by_size
from toolkit.poses.people import follow_signer, locate_people_in_frames
from toolkit.poses.pose_file import FloatArray, PoseError, PoseHeader, RawPose, check_dense, check_people, checked_fps

DEFAULT_FPS = 25.0
"""Frame rate of arrays for which neither the file (``fps``) nor the table gives one."""

_LARGEST_GROUP = 8  # more people than this, and more than frames, mean that the axes are in the wrong order
_MOST_SHARED = 1 << 22  # numbers beyond one for each byte of the file: the same list may be in several places
_NOBODY: FloatArray = np.zeros(0, np.float32)
_PLAIN_NUMBERS = (int, float, np.number)
Frames = FloatArray | list[FloatArray]
"""[frames, ...] where all frames have one shape, else one array a frame."""


def read_arrays(content: bytes, fps: float | None = None) -> RawPose:
    """Read keypoints.

    The arrays are keypoints [frames, points, 2..4] or [frames, people, points, 2..4] and, where the file holds more
    than one, scores without the last axis and ``fps``. Lists hold one array a frame, [points, 2..4] or
    [people, points, 2..4]; a frame without people is an empty array or None. The third of three coordinates is a score
    for OpenPose and COCO-WholeBody, else z; the fourth of four is a score. Without scores a point at the origin is
    missing.

    ``fps``, frames per second, overrules the file.

    Raises:
        PoseError: the bytes are no such file.
    """
    try:
        # A damaged file makes numpy and pickle warn before it is rejected.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return _to_pose(read_named_arrays(content), fps, len(content))
    except PoseError:
        raise
    except Exception as error:  # damaged array files raise too many kinds of errors to name them
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise PoseError(f"the arrays cannot be read: {reason}") from error


def _to_pose(found: dict[str, Any], given_fps: float | None, size: int) -> RawPose:
    """Give the arrays of a file of ``size`` bytes the point names and the shape of a pose file."""
    name = next((name for name in KEYPOINT_NAMES if name in found), None)
    if name is None:
        held = ", ".join(key[:40] for key in list(found)[:8]) or "nothing"
        raise PoseError(f"none of the arrays is called {', '.join(KEYPOINT_NAMES)}: the file holds {held}")
    values = _frames(found[name], name, size)
    score_name = next((name for name in CONFIDENCE_NAMES if found.get(name) is not None), None)
    scores = None if score_name is None else _frames(found[score_name], score_name, size)
    if isinstance(values, np.ndarray) and isinstance(scores, np.ndarray | None):
        values, scores = _of_equal_frames(values, name, scores, score_name)
    else:
        values, scores = _signer_of_frames(values, name, scores, score_name, size)

    points = layouts_by_size()[values.shape[2]]
    flat_layout = any(component == FACE_68 for component, _ in points)
    if scores is not None:
        confidence = scores
    elif values.shape[3] == 4 or (values.shape[3] == 3 and flat_layout):
        values, confidence = values[..., :-1], values[..., -1]
    else:
        confidence = np.asarray(values.any(axis=3), np.float32)
    if flat_layout:
        values = values[..., :2]
    return RawPose(
        checked_fps(_claimed_fps(found) if given_fps is None else DEFAULT_FPS, given_fps),
        _header(len(points), values.shape[3]),
        np.ascontiguousarray(values),
        np.ascontiguousarray(confidence),
    )


@lru_cache(maxsize=16)
def _header(num_points: int, dims: int) -> PoseHeader:
    points = layouts_by_size()[num_points]
    sizes = tuple((len(list(group)), dims) for _, group in groupby(points, key=lambda point: point[0]))
    return PoseHeader(0.0, points, sizes)


def _frames(value: Any, name: str, size: int) -> Frames:
    """An array of all frames, or a list of numbers or of one array a frame, as float32."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _numbers(value, name, size)
    if not isinstance(value, np.ndarray | list | tuple):
        raise PoseError(f"{name} holds a {type(value).__name__}, wanted numbers")
    check_dense(len(value), min(layouts_by_size()), 2, size)
    left = size + _MOST_SHARED
    frames = []
    for number, item in enumerate(value):
        frames.append(_numbers(item, f"{name}, frame {number}", left))
        left -= frames[-1].size
    if len({frame.shape for frame in frames}) == 1 and frames[0].size:
        return np.stack(frames)
    return frames


def _numbers(value: Any, where: str, most: int) -> FloatArray:
    """An array, or nested lists of at most so many numbers."""
    if value is None:
        return _NOBODY
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    count = _count_numbers(value, where, {})
    if count > most:
        raise PoseError(f"{where}: lists that repeat each other hold {count:,} numbers, more than the file has bytes")
    if not count:
        return _NOBODY if isinstance(value, list | tuple) else np.asarray(value, np.float32)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise PoseError(f"{where}: the people do not all have the same number of points") from error
    if array.dtype.kind not in "fiu":
        kind = type(value).__name__ if array.dtype == object else array.dtype
        raise PoseError(f"{where} holds {kind}, wanted numbers")
    return array.astype(np.float32)


def _count_numbers(value: Any, where: str, known: dict[int, int]) -> int:
    """How many numbers nested lists hold; one list may be in many places, so each is counted once."""
    if isinstance(value, _PLAIN_NUMBERS):
        return 1
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return value.size
    is_array = isinstance(value, np.ndarray)
    if not isinstance(value, list | tuple) and not (is_array and value.dtype == object):
        raise PoseError(f"{where} holds {value.dtype if is_array else type(value).__name__}, wanted numbers")
    if id(value) not in known:
        items = value.ravel().tolist() if is_array else value
        known[id(value)] = sum(
            1 if isinstance(item, _PLAIN_NUMBERS) else _count_numbers(item, where, known) for item in items
        )
    return known[id(value)]


def _of_equal_frames(
    values: FloatArray, name: str, scores: FloatArray | None, score_name: str | None
) -> tuple[FloatArray, FloatArray | None]:
    """Keypoints [frames, people, points, values] and scores [frames, people, points] of frames of one shape."""
    shape = values.shape
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or not 2 <= values.shape[3] <= 4 or 0 in values.shape:
        raise PoseError(
            f"the {name} have shape {shape}, wanted [frames, points, 2..4] or [frames, people, points, 2..4]",
            _advice_on_axes(shape),
        )
    frames, people = values.shape[:2]
    if people > max(frames, _LARGEST_GROUP):
        raise PoseError(f"the {name} have shape {shape}, which is {people} people in {frames} frames")
    check_people(people)
    _check_points(values.shape[2], name)
    if scores is not None:
        if scores.size != values[..., 0].size or len(scores) != frames:
            raise PoseError(f"the {score_name} have shape {scores.shape}, the {name} {shape}")
        scores = scores.reshape(values.shape[:3])
    return values, scores


def _advice_on_axes(shape: tuple[int, ...]) -> str:
    """Which other order or number of axes the array may have."""
    known = layouts_by_size()
    if len(shape) == 3 and 2 <= shape[0] <= 4 and shape[2] in known:
        return "move the coordinates from the first axis to the last"
    if len(shape) == 2:
        for points in known:
            if shape[1] in (2 * points, 3 * points, 4 * points):
                return f"give the {shape[1] // points} values of {points} points an axis of their own"
    return ""


def _check_points(points: int, where: str) -> None:
    if points not in layouts_by_size():
        known = ", ".join(map(str, sorted(layouts_by_size())))
        raise PoseError(f"{where}: an array of {points} points without names: known are {known}")


def _signer_of_frames(
    values: Frames, name: str, scores: Frames | None, score_name: str | None, size: int
) -> tuple[FloatArray, FloatArray | None]:
    """The signer alone, in the shapes of ``_of_equal_frames``, of frames whose number of people varies."""
    if scores is not None and len(scores) != len(values):
        raise PoseError(f"{name} holds {len(values)} frames, {score_name} {len(scores)}")
    people = [_people_of_frame(frame, f"{name}, frame {number}") for number, frame in enumerate(values)]
    shape = next((frame.shape[1:] for frame in people if len(frame)), None)
    if shape is None:
        raise PoseError("the file holds no people" if people else "the file holds no frames")
    _check_points(shape[0], name)
    check_people(max(map(len, people)))
    check_dense(len(people), shape[0], shape[1], size)
    confidences: list[FloatArray] = []
    for number, frame in enumerate(people):
        where = f"{name}, frame {number}"
        if len(frame) and frame.shape[1:] != shape:
            raise PoseError(
                f"{where}: {frame.shape[1]} points of {frame.shape[2]} values, before {shape[0]} of {shape[1]}"
            )
        if scores is None:
            seen = np.asarray((frame != 0).any(axis=2), np.float32)
        elif scores[number].size != len(frame) * shape[0]:
            raise PoseError(f"{score_name}, frame {number}: {scores[number].size} scores for {len(frame)} people")
        else:
            seen = scores[number].reshape(len(frame), shape[0])
        confidences.append(seen)

    places = follow_signer(
        locate_people_in_frames([*map(len, people)], lambda number: (people[number], confidences[number]))
    )
    data = np.zeros((len(people), 1, *shape), np.float32)
    confidence = np.zeros((len(people), 1, shape[0]), np.float32)
    for number, place in enumerate(places):
        if place >= 0:
            data[number, 0] = people[number][place]
            confidence[number, 0] = confidences[number][place]
    return data, None if scores is None else confidence


def _people_of_frame(frame: FloatArray, where: str) -> FloatArray:
    """[people, points, values] of a frame; an empty array has no people."""
    if frame.ndim == 2 and frame.size:
        frame = frame[None]
    if not frame.size:
        return np.zeros((0, 1, 2), np.float32)
    if frame.ndim != 3 or not 2 <= frame.shape[2] <= 4:
        raise PoseError(f"{where} has shape {frame.shape}, wanted [points, 2..4] or [people, points, 2..4]")
    return frame


def _claimed_fps(found: dict[str, Any]) -> float:
    value = found.get("fps")
    if value is None:
        return DEFAULT_FPS
    rates = np.unique(np.asarray(value, np.float64))
    if len(rates) != 1:
        raise PoseError(f"fps holds {rates.size} different numbers, wanted one")
    return float(rates[0])
