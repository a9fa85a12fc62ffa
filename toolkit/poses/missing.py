"""Find points that have a confidence but no place: one rule for ``.pose`` files and arrays.

Detectors and converters write unseen points in many ways. A point is missing

* if its confidence is 0 (or up to the set's ``min_confidence``), NaN or infinite;
* if a coordinate is NaN, infinite or a million units away;
* if it lies at the origin, where converters put unseen points, with confidence 1. One point at the origin is not
  missing: the one that the others of its component are normalised about. It is the only point of its component that
  is at the origin in every frame that shows the component, and others lie well to its left or above it, as they cannot
  about the corner of a picture;
* if all points of its component, three or more, lie in one place: an unseen hand after a shift or a normalisation.

``features.py`` checks the first two for every point; the others are rare and are checked here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from toolkit.poses.pose_file import FloatArray, PoseHeader

BoolArray = npt.NDArray[np.bool_]

_LEAST_OF_A_COMPONENT = 3  # two points may well meet
# Of the component's width or height: points just outside the picture have negative pixels, too.
_WELL_BEYOND = 0.1


def may_lack_place(values: FloatArray, visible: BoolArray) -> bool:
    """Whether some of these points could be without a place; fast, because every clip is checked.

    Args:
        values: coordinates of one person, [frames, points, 2 or more].
        visible: which points claim to be seen, [frames, points].
    """
    x, y = values[..., 0], values[..., 1]
    at_origin = (x == 0) & (y == 0) & visible
    # Points of one component stand beside each other, in files as in landmark sets.
    same = (x[:, 1:] == x[:, :-1]) & (y[:, 1:] == y[:, :-1]) & visible[:, 1:] & visible[:, :-1]
    return bool(at_origin.any() or same.any())


def without_place(data: FloatArray, confidence: FloatArray, header: PoseHeader) -> BoolArray:
    """Points of one person that lie at the origin, or in one place with all others of their component.

    Args:
        data: [frames, points, dims], all points of the file.
        confidence: [frames, points].
        header: the names of the points.

    Returns:
        [frames, points].
    """
    result = np.zeros(data.shape[:2], bool)
    start = 0
    for points, dims in header.component_sizes:
        columns = slice(start, start + points)
        result[:, columns] = _of_component(data[:, columns, :dims], confidence[:, columns])
        start += points
    return result


def _of_component(values: FloatArray, confidence: FloatArray) -> BoolArray:
    at_origin: BoolArray = np.asarray((values == 0).all(axis=2))
    one_place: BoolArray = np.zeros(len(values), bool)
    if values.shape[1] >= _LEAST_OF_A_COMPONENT:
        one_place = np.asarray((values == values[:, :1]).all(axis=(1, 2)))
    shown = ~(at_origin.all(axis=1) | one_place)
    if shown.any():
        always = np.flatnonzero((at_origin & (confidence > 0))[shown].all(axis=0))
        if len(always) == 1 and _surrounds_origin(values[shown]):
            at_origin[shown, always[0]] = False
    return at_origin | one_place[:, None]


def _surrounds_origin(values: FloatArray) -> bool:
    flat = values[..., :2]
    flat = flat[np.isfinite(flat).all(axis=2)]
    low, high = flat.min(axis=0), flat.max(axis=0)
    return bool((low < -_WELL_BEYOND * (high - low)).any())
