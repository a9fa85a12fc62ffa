"""One clip's recorded pose becomes the features that a model reads: chosen, normalised and resampled in time.

A missing landmark is NaN in every channel, from here to the batch: a zero would be a place, and a model would learn
from it. Values are told in shoulder widths from the middle of the shoulders: where the camera stood does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from toolkit.poses.arrays import is_array_file, read_arrays
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import FloatArray, PoseError, PoseHeader, RawPose, read_pose

FEATURES_VERSION = 1  # counts up when the same file would give other features
TooLong = Literal["subsample", "cut", "reject"]
NORMALISATION = "shoulders: origin = median mid-shoulder of the clip, unit = median shoulder width of the clip"
_SHOULDERS = (("POSE_LANDMARKS", "LEFT_SHOULDER"), ("POSE_LANDMARKS", "RIGHT_SHOULDER"))
# In the units of the file, be they pixels, metres or widths of the picture: nothing smaller is a distance between
# shoulders, nothing farther away is a place.
_LEAST_UNIT = 1e-3
_FARTHEST = 1e6
LARGEST_LACK = 0.5
"""Share of a landmark set that a file may lack: beyond it the set was made for other files."""
# No shoulders are this near to each other in pixels, and no body is this shallow in pixels.
_LEAST_PIXELS = 8.0


@dataclass(frozen=True)
class ClipFeatures:
    """The features of one clip and what was done to get them.

    Attributes:
        values: float32 [frames, points, channels]; NaN = missing.
        normalised_by: ``shoulders``, or ``spread`` where no frame shows both shoulders.
        shortened: the clip was longer than allowed and was subsampled or cut.
        hands_visible: share of frames that show a landmark of at least one hand; 1.0 for sets without hands.
        lacking: the landmarks of the set that the file does not have at all; they are missing in every frame.
    """

    values: FloatArray
    normalised_by: Literal["shoulders", "spread"]
    shortened: bool
    hands_visible: float
    lacking: tuple[tuple[str, str], ...]


def extract_features(
    pose: bytes | RawPose,
    landmark_set: LandmarkSet,
    fps: float,
    *,
    min_frames: int = 1,
    max_frames: int | None = None,
    too_long: TooLong = "subsample",
) -> ClipFeatures:
    """Turn a recorded pose into features.

    Args:
        pose: the bytes of a ``.pose``, ``.npy``, ``.npz`` or ``.pkl`` file, or what ``read_clip`` made of them.
        landmark_set: which points, in which order, with which channels.
        fps: frames per second of the result; the clip is resampled in time, whatever its own rate.
        min_frames: a shorter result is refused.
        max_frames: a longer result is subsampled to this length, cut to it, or refused.
        too_long: which of the three.

    Returns:
        Features, float32 [frames, points, channels] in shoulder widths, NaN where a landmark is missing.

    Raises:
        PoseError: the clip cannot be used; the message is the reason.
    """
    raw = read_clip(pose) if isinstance(pose, bytes) else pose
    positions, shortened = _sample_positions(raw.num_frames, raw.fps, fps, min_frames, max_frames, too_long)
    columns, shoulders = _columns(raw.header, landmark_set)
    lacks = columns < 0
    person = _most_visible_person(raw.confidence, columns)
    coordinates = 3 if "z" in landmark_set.channels else 2
    if raw.data.shape[3] < coordinates:
        raise PoseError(
            f"the file has no z coordinate, and the landmark set {landmark_set.name} asks for one: "
            "isign_76 and unisign_69 do not, nor need a set of your own"
        )

    wanted = np.concatenate([columns, shoulders])
    values = raw.data[:, person, wanted, :coordinates].astype(np.float32)
    confidence = raw.confidence[:, person, wanted]
    # A comparison with NaN is false: files hold NaN and infinities, also with confidence 1.
    visible = (confidence > landmark_set.min_confidence) & (np.abs(values) < _FARTHEST).all(axis=2)
    visible[:, : len(columns)] &= ~lacks
    values[~visible] = 0.0  # only until the end of this function: arithmetic on NaN would spread it

    chosen = visible[:, : len(columns)]
    if not chosen.any():
        raise PoseError("no landmark of the set is visible in any frame")
    origin, unit, normalised_by = _scale(values, visible, len(columns))
    values = (values[:, : len(columns)] - origin) / unit
    if coordinates == 3:
        values[..., 2] *= _depth_unit(raw.header, unit, values, chosen)
        _set_depth_origins(values[..., 2], chosen, landmark_set)
    values, chosen = _tell_relative_to_anchors(values, chosen, landmark_set)
    if "confidence" in landmark_set.channels:
        values = np.concatenate([values, confidence[:, : len(columns), None].clip(0, 1)], axis=2)
    values, chosen = resample(values, chosen, positions)
    values[~chosen] = np.nan
    lacking = tuple(landmark_set.points[index] for index in np.flatnonzero(lacks))
    return ClipFeatures(values, normalised_by, shortened, _hands_visible(chosen, landmark_set), lacking)


def read_clip(content: bytes) -> RawPose:
    """Parse the bytes of a ``.pose``, ``.npy``, ``.npz`` or ``.pkl`` file; raises PoseError."""
    return read_arrays(content) if is_array_file(content) else read_pose(content)


@lru_cache(maxsize=16)
def _find_columns(points: tuple[tuple[str, str], ...], wanted: tuple[tuple[str, str], ...]) -> tuple[int | None, ...]:
    index = {point: position for position, point in reversed(list(enumerate(points)))}
    return tuple(index.get(point) for point in wanted)


def _columns(header: PoseHeader, landmark_set: LandmarkSet) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where the landmarks of the set stand in the file (-1 for those that it lacks), and where its shoulders stand.

    Raises:
        PoseError: the file lacks more than half of the set.
    """
    found = _find_columns(header.points, landmark_set.points)
    missing = [point for point, column in zip(landmark_set.points, found, strict=True) if column is None]
    if len(missing) > LARGEST_LACK * len(found):
        named = ", ".join("/".join(point) for point in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise PoseError(f"the file lacks {len(missing)} points of the landmark set {landmark_set.name}: {named}")
    shoulders = [column for column in _find_columns(header.points, _SHOULDERS) if column is not None]
    return np.array([-1 if column is None else column for column in found], np.intp), np.array(
        shoulders if len(shoulders) == 2 else [], np.intp
    )


def _most_visible_person(confidence: FloatArray, columns: npt.NDArray[np.intp]) -> int:
    """Of several people the one whose chosen landmarks are seen most."""
    if confidence.shape[1] == 1:
        return 0
    with np.errstate(invalid="ignore"):
        seen = np.nan_to_num(confidence[:, :, columns], nan=0.0, posinf=0.0, neginf=0.0).clip(0, 1)
    return int(seen.sum(axis=(0, 2)).argmax())


def _sample_positions(
    frames: int, own_fps: float, fps: float, min_frames: int, max_frames: int | None, too_long: TooLong
) -> tuple[npt.NDArray[np.float64], bool]:
    """At which (fractional) frames of the file the features are sampled, and whether the clip was too long."""
    count = int((frames - 1) / own_fps * fps + 1e-6) + 1
    if count < min_frames:
        raise PoseError(f"too short: {count} frames at {fps:g} fps, at least {min_frames} wanted")
    shortened = max_frames is not None and count > max_frames
    if shortened:
        assert max_frames is not None
        if too_long == "reject":
            raise PoseError(f"too long: {count} frames at {fps:g} fps, at most {max_frames} wanted")
        if too_long == "subsample":
            return np.linspace(0, frames - 1, max_frames), True
        count = max_frames
    return np.minimum(np.arange(count) * (own_fps / fps), frames - 1), shortened


def _scale(
    values: FloatArray, visible: npt.NDArray[np.bool_], num_points: int
) -> tuple[FloatArray, float, Literal["shoulders", "spread"]]:
    """Origin [coordinates] and unit of a clip; columns from ``num_points`` on are its two shoulders, if it has them.

    A clip in which no frame shows both shoulders is measured by the landmarks that it does show: their median is the
    origin, and the span of their x or y (5th to 95th percentile, the larger) counts as one shoulder width.
    """
    if values.shape[1] > num_points:
        seen = visible[:, num_points] & visible[:, num_points + 1]
        left, right = values[seen, num_points], values[seen, num_points + 1]
        width = float(np.median(np.hypot(*(left - right)[:, :2].T))) if seen.any() else 0.0
        if width > _LEAST_UNIT:
            return np.median((left + right) / 2, axis=0).astype(np.float32), width, "shoulders"
    shown = values[:, :num_points][visible[:, :num_points]]
    low, high = np.percentile(shown[:, :2], [5, 95], axis=0)
    origin = np.median(shown, axis=0).astype(np.float32)
    return origin, max(float((high - low).max()), _LEAST_UNIT), "spread"


def _depth_unit(header: PoseHeader, unit: float, values: FloatArray, visible: npt.NDArray[np.bool_]) -> float:
    """What z must be multiplied by to be told in the unit of x and y.

    Files made from MediaPipe by pose-format tell x and y in pixels but z in widths of the picture.
    """
    low, high = np.percentile(values[..., 2][visible], [5, 95])
    in_widths = unit > _LEAST_PIXELS and (high - low) * unit < _LEAST_PIXELS
    return float(header.width) if in_widths and header.width else 1.0


def _set_depth_origins(depth: FloatArray, visible: npt.NDArray[np.bool_], landmark_set: LandmarkSet) -> None:
    """Tell the depth [frames, points] of hands from their own wrist and of a face from its own middle, in place.

    MediaPipe estimates depth for the body, each hand and the face apart: differences between them mean nothing, and
    would only add a random offset to every clip. The body keeps the middle of the shoulders as its origin.
    """
    for indices in landmark_set.parts.values():
        component = landmark_set.points[indices[0]][0]
        columns = list(indices)
        wrist = landmark_set.position(component, "WRIST")
        if wrist is not None:
            depth[:, columns] -= depth[:, wrist, None]
        elif component == "FACE_LANDMARKS" and visible[:, columns].any():
            depth[:, columns] -= np.median(depth[:, columns][visible[:, columns]])


def _tell_relative_to_anchors(
    values: FloatArray, visible: npt.NDArray[np.bool_], landmark_set: LandmarkSet
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Move each part that has an anchor so that it lies at the origin; where it is missing, the part is missing."""
    for part, anchor in (landmark_set.anchors or {}).items():
        indices = list(landmark_set.parts[part])
        values[:, indices] = values[:, indices] - values[:, anchor, None]
        visible[:, indices] &= visible[:, anchor, None]
    return values, visible


def resample(
    values: FloatArray, visible: npt.NDArray[np.bool_], positions: npt.NDArray[np.float64]
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Sample [frames, points, channels] at fractional frames, by linear interpolation between visible neighbours.

    With one of the two neighbours missing, the other is taken where it is the nearer one; else the sample is missing.
    """
    before = np.floor(positions).astype(np.intp)
    after = np.minimum(before + 1, len(values) - 1)
    share = (positions - before).astype(np.float32)
    if not share.any():
        return values[before], visible[before]
    weight_after = share[:, None] * visible[after]
    weight_before = (1 - share)[:, None] * visible[before]
    weight = weight_before + weight_after
    sampled = values[before] * weight_before[..., None] + values[after] * weight_after[..., None]
    return sampled / np.maximum(weight, 1e-6)[..., None], weight >= 0.5


def _hands_visible(visible: npt.NDArray[np.bool_], landmark_set: LandmarkSet) -> float:
    hands = [index for part in ("left_hand", "right_hand") for index in landmark_set.parts.get(part, ())]
    return float(visible[:, hands].any(axis=1).mean()) if hands else 1.0
