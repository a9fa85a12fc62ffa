"""Turn one clip's recorded pose into the features that a model reads: selected, normalised and resampled in time.

A missing landmark is NaN in every channel, from here to the batch: a zero would be a place, and a model would learn
from it. Values are in shoulder widths from the middle of the shoulders, so the position of the camera does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from toolkit.poses.array_files import is_array_file
from toolkit.poses.arrays import read_arrays
from toolkit.poses.compressed import decompress
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.missing import may_lack_place, without_place
from toolkit.poses.people import follow_signer, locate_people
from toolkit.poses.pose_file import FloatArray, PoseError, PoseHeader, RawPose, read_pose

FEATURES_VERSION = 2  # counts up when the same file would give other features
TooLong = Literal["subsample", "cut", "reject"]
NORMALISATION = "shoulders: origin = median mid-shoulder of the clip, unit = median shoulder width of the clip"
_SHOULDERS = (("POSE_LANDMARKS", "LEFT_SHOULDER"), ("POSE_LANDMARKS", "RIGHT_SHOULDER"))
# In the units of the file (pixels, metres or widths of the picture): a smaller distance between shoulders and a larger
# coordinate are errors of the detector.
_LEAST_UNIT = 1e-3
_FARTHEST = 1e6
LARGEST_LACK = 0.5
"""Largest share of a landmark set that a file may lack; a set that lacks more was made for other files."""
# In pixels: shoulders are farther apart than this, and depth varies by more than this (standard deviation).
_LEAST_PIXELS = 8.0
_FLATTEST_PIXELS = 3.0


@dataclass(frozen=True)
class ClipFeatures:
    """The features of one clip and what was done to get them."""

    values: FloatArray  # float32 [frames, points, channels]; NaN = missing
    normalised_by: Literal["shoulders", "spread"]  # spread: no frame shows both shoulders
    shortened: bool  # the clip was longer than allowed and was subsampled or truncated
    hands_visible: float  # share of frames that show a landmark of a hand; 1.0 for sets without hands
    lacking: tuple[tuple[str, str], ...]  # landmarks of the set that the file does not contain
    without_place: int  # landmarks, over all frames, with a confidence but no place; they are missing
    times: npt.NDArray[np.float64]  # seconds of the recording at which it was sampled, [frames]


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
        pose: the bytes of a ``.pose``, ``.npy``, ``.npz`` or ``.pkl`` file, or what ``read_clip`` returned.
        landmark_set: which points, in which order, with which channels.
        fps: frames per second of the result; the clip is resampled in time, whatever its own rate.
        min_frames: a shorter result is an error.
        max_frames: a longer result is subsampled or truncated to this length, or an error.
        too_long: which of the three.

    Returns:
        features, float32 [frames, points, channels] in shoulder widths, NaN where a landmark is missing.

    Raises:
        PoseError: the clip cannot be used; the message is the reason.
    """
    raw = read_clip(pose) if isinstance(pose, bytes) else pose
    positions, shortened = sample_positions(raw.num_frames, raw.fps, fps, min_frames, max_frames, too_long)
    columns, shoulders = _columns(raw.header, landmark_set)
    if raw.data.shape[3] < _num_coordinates(landmark_set):
        raise PoseError(
            f"the file has no z coordinate, and the landmark set {landmark_set.name} needs one",
            "choose isign_76 or unisign_69, or a set of your own without z",
        )
    signer = _Signer(*_find_signer(raw, columns), raw.header)
    step = _whole_step(positions)
    with np.errstate(all="ignore"):  # values that are not visible may be anything; they become NaN below
        values, visible, num_placeless = signer.landmarks(slice(None, None, step), columns, landmark_set)
        if step:
            values, visible = values[: len(positions)], visible[: len(positions)]
        else:
            values, visible = interpolate_frames(values, visible, positions)
        if not visible.any():
            raise PoseError("no landmark of the set is visible in any frame")
        scale = None
        if len(shoulders):
            scale = _shoulder_scale(*signer.landmarks(slice(None), shoulders, landmark_set)[:2])
        _normalise(values, visible, scale, raw.header, landmark_set)
        if not visible.all():
            values[~visible] = np.nan
    lacking = tuple(landmark_set.points[index] for index in np.flatnonzero(columns < 0))
    normalised_by: Literal["shoulders", "spread"] = "shoulders" if scale else "spread"
    hands_visible, times = _hands_visible(visible, landmark_set), positions / raw.fps
    return ClipFeatures(values, normalised_by, shortened, hands_visible, lacking, num_placeless, times)


def _num_coordinates(landmark_set: LandmarkSet) -> int:
    return 3 if "z" in landmark_set.channels else 2


@dataclass(frozen=True)
class _Signer:
    """The recording of one person: data [frames, points, dims] and confidence [frames, points] of all points."""

    data: FloatArray
    confidence: FloatArray
    header: PoseHeader

    @cached_property
    def _without_place(self) -> npt.NDArray[np.bool_]:
        return without_place(self.data, self.confidence, self.header)

    def landmarks(
        self, frames: slice, columns: npt.NDArray[np.intp], landmark_set: LandmarkSet
    ) -> tuple[FloatArray, npt.NDArray[np.bool_], int]:
        """Select landmarks.

        Returns:
            values [frames, columns, channels], which of them are visible [frames, columns], and how many of them have
            a confidence but no place.
        """
        coordinates = _num_coordinates(landmark_set)
        values = _gather(self.data[frames], columns)
        confidence = _gather(self.confidence[frames, :, None], columns)[..., 0]
        visible = _visible(values[..., :coordinates], confidence, landmark_set.min_confidence)
        visible &= columns >= 0
        num_placeless = 0
        if may_lack_place(values, visible):
            placeless = visible & self._without_place[frames][:, columns]
            num_placeless = int(placeless.sum())
            visible &= ~placeless
        if "confidence" in landmark_set.channels:
            values = np.concatenate([values[..., :coordinates], confidence[..., None].clip(0, 1)], axis=2)
        else:
            values = np.ascontiguousarray(values[..., :coordinates])
        return values, visible, num_placeless


def _normalise(
    values: FloatArray,
    visible: npt.NDArray[np.bool_],
    scale: tuple[FloatArray, float] | None,
    header: PoseHeader,
    landmark_set: LandmarkSet,
) -> None:
    """Make coordinates relative to the origin, in the unit of ``scale``, in place; without a scale, by their spread."""
    coordinates = _num_coordinates(landmark_set)
    origin, unit = scale or _spread_scale(values[..., :coordinates], visible)
    values[..., :coordinates] -= origin[:coordinates]
    values[..., :coordinates] /= unit
    if coordinates == 3:
        values[..., 2] *= _depth_unit(header, unit, values[..., 2][visible])
        _set_depth_origins(values[..., 2], visible, landmark_set)
    _make_relative_to_anchors(values[..., :coordinates], visible, landmark_set)


def read_clip(content: bytes, fps: float | None = None) -> RawPose:
    """Parse a ``.pose``, ``.npy``, ``.npz`` or ``.pkl`` file, perhaps compressed by gzip; raises PoseError.

    ``fps``, frames per second as the table or the user gives them, overrules the file.
    """
    content = decompress(content)
    return read_arrays(content, fps) if is_array_file(content) else read_pose(content, fps)


def recorded_points(raw: RawPose, landmark_set: LandmarkSet) -> FloatArray:
    """The x and y of a set's landmarks as recorded, to draw a clip: float32 [frames, points, 2], NaN = missing.

    Raises:
        PoseError: the file lacks more than half of the set.
    """
    columns, _ = _columns(raw.header, landmark_set)
    data, all_confidence = _find_signer(raw, columns)
    values = _gather(data, columns)[..., :2]
    confidence = _gather(all_confidence[:, :, None], columns)[..., 0]
    visible = _visible(values, confidence, landmark_set.min_confidence) & (columns >= 0)
    visible &= ~without_place(data, all_confidence, raw.header)[:, columns]
    return np.where(visible[..., None], values, np.float32(np.nan))


@lru_cache(maxsize=16)
def _find_columns(header: PoseHeader, wanted: tuple[tuple[str, str], ...]) -> tuple[int | None, ...]:
    index = {point: position for position, point in reversed(list(enumerate(header.points)))}
    return tuple(index.get(point) for point in wanted)


def _columns(header: PoseHeader, landmark_set: LandmarkSet) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The indices in the file of the set's landmarks (-1 for those that it lacks), and those of the shoulders.

    Raises:
        PoseError: the file lacks more than half of the set.
    """
    found = _find_columns(header, landmark_set.points)
    missing = [point for point, column in zip(landmark_set.points, found, strict=True) if column is None]
    if len(missing) > LARGEST_LACK * len(found):
        named = ", ".join("/".join(point) for point in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise PoseError(f"the file lacks {len(missing)} points of the landmark set {landmark_set.name}: {named}")
    shoulders = [column for column in _find_columns(header, _SHOULDERS) if column is not None]
    return np.array([-1 if column is None else column for column in found], np.intp), np.array(
        shoulders if len(shoulders) == 2 else [], np.intp
    )


def _find_signer(raw: RawPose, columns: npt.NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Data [frames, points, dims] and confidence [frames, points] of the person who is seen most."""
    if raw.data.shape[1] == 1:
        return raw.data[:, 0], raw.confidence[:, 0]
    columns = columns[columns >= 0]
    values, confidence = raw.data[:, :, columns], raw.confidence[:, :, columns]
    with np.errstate(all="ignore"):
        seen = (confidence > 0) & (confidence < np.inf) & (np.abs(values) < _FARTHEST).all(axis=3)
    for person in range(raw.data.shape[1]):
        taken = without_place(raw.data[:, person], raw.confidence[:, person], raw.header)
        seen[:, person] &= ~taken[:, columns]
    places = follow_signer(locate_people(values, confidence, seen))
    frames = np.arange(len(places))
    return raw.data[frames, places], np.where(places[:, None] >= 0, raw.confidence[frames, places], np.float32(0))


def sample_positions(
    frames: int, own_fps: float, fps: float, min_frames: int, max_frames: int | None, too_long: TooLong
) -> tuple[npt.NDArray[np.float64], bool]:
    """The (fractional) frames of the file at which features are sampled, and whether the clip was too long.

    Raises:
        PoseError: the clip has too few frames, or too many where ``too_long`` is ``reject``.
    """
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


def _whole_step(positions: npt.NDArray[np.float64]) -> int | None:
    """The step of positions that fall on every n-th frame from the first; None when some fall between frames."""
    if len(positions) == 1:
        return 1
    step = round(positions[1] - positions[0])
    return step if step >= 1 and np.abs(positions - step * np.arange(len(positions))).max() < 1e-6 else None


def _gather(data: FloatArray, columns: npt.NDArray[np.intp]) -> FloatArray:
    """``data[:, columns]`` of an array [frames, points, values] that may lie at any address.

    The floats of a file are rarely aligned, and numpy copies unaligned floats one by one but opaque points whole.
    """
    opaque = data.view(f"V{4 * data.shape[2]}")[..., 0]
    picked = np.ascontiguousarray(opaque[:, columns])
    return picked.view(np.float32).reshape(len(data), len(columns), data.shape[2])


def _visible(values: FloatArray, confidence: FloatArray, min_confidence: float) -> npt.NDArray[np.bool_]:
    """Which landmarks [frames, points] have a place; files hold NaN and infinities, also with confidence 1."""
    visible = (confidence > min_confidence) & (confidence < np.inf)
    if not np.abs(values).max(initial=0.0) < _FARTHEST:  # true for NaN; rare, and checking every point is slow
        visible &= (np.abs(values) < _FARTHEST).all(axis=2)
    return visible


def _shoulder_scale(shoulders: FloatArray, visible: npt.NDArray[np.bool_]) -> tuple[FloatArray, float] | None:
    """Origin and unit from two shoulders [frames, 2, coordinates and more], None if no frame shows both."""
    left, right = shoulders[visible.all(axis=1)].transpose(1, 0, 2)
    if not len(left):
        return None
    width = float(np.median(np.hypot(left[:, 0] - right[:, 0], left[:, 1] - right[:, 1])))
    if width <= _LEAST_UNIT:
        return None
    return np.median((left + right) / 2, axis=0).astype(np.float32), width


def _spread_scale(values: FloatArray, visible: npt.NDArray[np.bool_]) -> tuple[FloatArray, float]:
    """Origin and unit of a clip that never shows both shoulders, from the landmarks that it does show.

    Their median is the origin, and the span of their x or y (5th to 95th percentile, the larger) is the unit.
    """
    shown = values[visible]
    low, high = np.percentile(shown[:, :2], [5, 95], axis=0)
    return np.median(shown, axis=0).astype(np.float32), max(float((high - low).max()), _LEAST_UNIT)


def _depth_unit(header: PoseHeader, unit: float, depths: FloatArray) -> float:
    """The factor that brings z to the unit of x and y.

    Files made from MediaPipe by pose-format have x and y in pixels but z in widths of the picture.
    """
    in_widths = header.width > 0 and unit > _LEAST_PIXELS and depths.std() * unit < _FLATTEST_PIXELS
    return float(header.width) if in_widths else 1.0


def _set_depth_origins(depth: FloatArray, visible: npt.NDArray[np.bool_], landmark_set: LandmarkSet) -> None:
    """Make the depth [frames, points] of a hand relative to its wrist and that of a face to its middle, in place.

    MediaPipe estimates the depth of the body, each hand and the face separately: differences between them would only
    add a random offset to every clip. The origin of the body stays the middle of the shoulders.
    """
    for indices in landmark_set.parts.values():
        component = landmark_set.points[indices[0]][0]
        columns = list(indices)
        wrist = landmark_set.position(component, "WRIST")
        if wrist is not None:
            depth[:, columns] -= np.where(visible[:, wrist], depth[:, wrist], 0)[:, None]
        elif component == "FACE_LANDMARKS" and visible[:, columns].any():
            depth[:, columns] -= depth[:, columns].mean(where=visible[:, columns])


def _make_relative_to_anchors(values: FloatArray, visible: npt.NDArray[np.bool_], landmark_set: LandmarkSet) -> None:
    """Move the anchor of each part that has one to the origin, in place; a missing anchor means a missing part."""
    for part, anchor in (landmark_set.anchors or {}).items():
        indices = list(landmark_set.parts[part])
        values[:, indices] = values[:, indices] - values[:, anchor, None]
        visible[:, indices] &= visible[:, anchor, None]


def interpolate_frames(
    values: FloatArray, visible: npt.NDArray[np.bool_], positions: npt.NDArray[np.float64]
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Sample [frames, points, channels] at fractional frames, by linear interpolation between visible neighbours.

    If one of the two neighbours is missing, the sample is the other where that is the nearer one, else missing.
    """
    before = np.floor(positions).astype(np.intp)
    after = np.minimum(before + 1, len(values) - 1)
    share = (positions - before).astype(np.float32)[:, None]
    weight_before, weight_after = (1 - share) * visible[before], share * visible[after]
    weight = weight_before + weight_after
    values = np.where(visible[..., None], values, 0)  # zero times NaN is not zero
    sampled = values[before] * weight_before[..., None] + values[after] * weight_after[..., None]
    return sampled / np.maximum(weight, 1e-6)[..., None], weight >= 0.5


def _hands_visible(visible: npt.NDArray[np.bool_], landmark_set: LandmarkSet) -> float:
    hands = [index for part in ("left_hand", "right_hand") for index in landmark_set.parts.get(part, ())]
    return float(visible[:, hands].any(axis=1).mean()) if hands else 1.0
