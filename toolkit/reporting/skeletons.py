"""Skeletons that are small enough for a page to hold: landmarks in the plane as 16-bit integers, base64.

``assets/skeleton.js`` draws them, for reports and for the demo app.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.poses.landmarks import LandmarkSet

MISSING = -1
# The picture spans this many steps; landmarks outside of it have a margin on both sides.
SPAN = 16_000
MARGIN = 8_000

# The body landmark where a part belongs whose coordinates are relative to an anchor of its own.
_BODY_LANDMARKS = {"left_hand": "LEFT_WRIST", "right_hand": "RIGHT_WRIST", "face": "NOSE"}

Floats = npt.NDArray[np.floating[Any]]


def skeleton_layout(landmark_set: LandmarkSet) -> dict[str, Any]:
    """What is the same for all clips: ``points``, ``parts`` (name -> indices) and ``edges`` (pairs of indices)."""
    return {
        "points": landmark_set.num_points,
        "parts": {name: list(indices) for name, indices in landmark_set.parts.items()},
        "edges": [list(edge) for edge in landmark_set.edges],
    }


def pack_clip(features: Floats, landmark_set: LandmarkSet, fps: float, most_bytes: int) -> dict[str, Any]:
    """Embed a clip.

    Args:
        features: [frames, points, channels], x and y first, NaN = missing.
        landmark_set: which points they are.
        fps: frames per second.
        most_bytes: of a longer clip only every second, third ... frame is kept, so that its landmarks fit.

    Returns:
        ``frames``, ``fps``, ``stride`` (of how many frames one is kept), ``aspect`` (height over width of the picture)
        and ``data``: base64 of little-endian int16 [frames, points, 2]; -1 = missing, else 8,000 + 16,000 x the
        distance from the left or upper edge, in picture widths.
    """
    stride = max(1, math.ceil(len(features) * landmark_set.num_points * 4 / most_bytes))
    places = place_on_body(np.asarray(features[::stride, :, :2], np.float32), landmark_set)
    seen = np.isfinite(places).all(axis=2)
    low, high = _box(places[seen])
    width, height = high - low
    steps = np.full(places.shape, MISSING, "<i2")
    steps[seen] = np.clip((places[seen] - low) / width * SPAN + MARGIN, 0, 2**15 - 1).astype("<i2")
    return {
        "frames": len(places),
        "fps": round(fps / stride, 4),
        "stride": stride,
        "aspect": round(float(height / width), 4),
        "data": base64.b64encode(steps.tobytes()).decode("ascii"),
    }


def place_on_body(places: npt.NDArray[np.float32], landmark_set: LandmarkSet) -> npt.NDArray[np.float32]:
    """Move parts of [frames, points, 2] that are relative to their own anchor to their place on the body."""
    if not landmark_set.anchors:
        return places
    places = places.copy()
    for part in landmark_set.anchors:
        indices = list(landmark_set.parts[part])
        landmark = landmark_set.position("POSE_LANDMARKS", _BODY_LANDMARKS.get(part, ""))
        # Without that landmark the place of the part is unknown, so it is not drawn.
        places[:, indices] += places[:, [landmark]] if landmark is not None and landmark not in indices else np.nan
    return places


def _box(places: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Corners of a picture that shows nearly all [points, 2], with a margin; a few outliers do not shrink the rest."""
    if not len(places):
        return np.zeros(2, np.float32), np.ones(2, np.float32)
    low, high = np.percentile(places, [0.5, 99.5], axis=0).astype(np.float32)
    middle, half = (low + high) / 2, (high - low) / 2
    # At least one shoulder width each way, and no strip that is many times as wide as high.
    half = np.maximum(half * 1.12, max(0.5, float(half.max()) / 2))
    return middle - half, middle + half
