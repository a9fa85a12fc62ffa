"""Read feature files: one vector a frame, as another network made it of the video (SHuBERT, DINO, I3D, SignCLIP).

A file is ``.npy``, ``.npz``, ``.h5`` or ``.safetensors`` and holds one array [frames, dimensions] of a frame rate of
its own: features are sampled at the times at which a corpus samples its clips. No pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError
from toolkit.poses.array_files import NPY, ZIP, read_npy, read_npz
from toolkit.poses.compressed import decompress
from toolkit.poses.features import ClipFeatures, TooLong, extract_features, sample_positions
from toolkit.poses.hdf5 import HDF5, read_hdf5
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import FloatArray, PoseError, RawPose, frames_between

FEATURE_NAMES = ("features", "feature", "embeddings", "embedding", "data", "arr_0")
"""Accepted names of the array; a file with one array may call it anything."""
RATE_NAME = "fps"  # of the frame rate: an array of an .npz, an attribute or array of an .h5, metadata of a .safetensors
_RATES = (0.1, 1000.0)
# Networks that read windows of frames give none for the last ones.
LARGEST_DIFFERENCE, ALLOWED_SECONDS = 0.1, 1.0
"""By how much features may be longer or shorter than the poses of a clip: this share, and so many seconds."""
_SET_RATE = "set data.features_fps to their frame rate, or write it into a column features_fps"
_BFLOAT16 = "BF16"
_SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BFLOAT16: "<u2", "I32": "<i4", "I8": "i1", "U8": "u1"}


@dataclass(frozen=True)
class RawFeatures:
    """The features of one file."""

    values: npt.NDArray[Any]  # numbers of any kind, [frames, dimensions]
    fps: float  # frames per second

    @property
    def num_frames(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return int(self.values.shape[1])

    def between(self, start: float | None, end: float | None) -> RawFeatures:
        """The frames of [start, end) seconds; raises PoseError where no frame lies there."""
        return RawFeatures(self.values[frames_between(start, end, self.num_frames, self.fps)], self.fps)

    def at(self, times: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
        """The features at these times in seconds, by linear interpolation: float16 [times, dimensions].

        Raises:
            PoseError: a value is not finite, or beyond float16.
        """
        places = np.minimum(times * self.fps, self.num_frames - 1)
        before = np.floor(places + 1e-6).astype(np.intp)
        share = np.maximum(places - before, 0).astype(np.float32)
        found = self.values[before]
        with np.errstate(all="ignore"):  # what is not finite is refused below
            if share.max(initial=0) > 1e-4:
                after = self.values[np.minimum(before + 1, self.num_frames - 1)]
                found = found * (1 - share)[:, None] + after * share[:, None]
            packed: npt.NDArray[np.float16] = found.astype(np.float16)
        if not np.isfinite(packed).all():
            if np.isfinite(found).all():
                raise PoseError("the features exceed 65,504, the largest number of float16", "scale them down")
            raise PoseError("the features hold NaN or infinite values", "make them again from their video")
        return packed


@dataclass(frozen=True)
class Recording:
    """One clip as recorded: its poses, what another network made of its video, or both."""

    poses: RawPose | None
    features: RawFeatures | None = None

    @property
    def _clock(self) -> RawPose | RawFeatures:
        found = self.poses or self.features
        assert found, "a clip has poses, features or both"
        return found

    @property
    def num_frames(self) -> int:
        return self._clock.num_frames

    @property
    def fps(self) -> float:
        return self._clock.fps

    def between(self, start: float | None, end: float | None) -> Recording:
        """The frames of [start, end) seconds; raises PoseError where no frame lies there."""
        parts = (part and part.between(start, end) for part in (self.poses, self.features))
        return Recording(*parts)  # type: ignore[arg-type]

    def sampled(
        self,
        landmark_set: LandmarkSet,
        fps: float,
        *,
        min_frames: int = 1,
        max_frames: int | None = None,
        too_long: TooLong = "subsample",
    ) -> SampledClip:
        """Its poses and features at the same times; the settings are those of :func:`extract_features`.

        Raises:
            PoseError: the clip cannot be used; the message is the reason.
        """
        if self.poses:
            found = extract_features(
                self.poses, landmark_set, fps, min_frames=min_frames, max_frames=max_frames, too_long=too_long
            )
            if self.features:
                check_duration(self.features, self.num_frames / self.fps)
            values, times, shortened = found.values, found.times, found.shortened
        else:
            positions, shortened = sample_positions(self.num_frames, self.fps, fps, min_frames, max_frames, too_long)
            found, times = None, positions / self.fps
            values = np.empty((len(times), *landmark_set.shape), np.float32)
        return SampledClip(values, self.features.at(times) if self.features else None, shortened, found)


@dataclass(frozen=True)
class SampledClip:
    """The arrays of one clip, with the same frames."""

    features: FloatArray  # of the poses, float32 [frames, points, channels]; NaN = missing
    video_features: npt.NDArray[np.float16] | None  # of another network [frames, dimensions]
    shortened: bool  # the clip was longer than allowed and was subsampled or truncated
    poses: ClipFeatures | None  # what was done to the poses, if it has any


def read_features(content: bytes, fps: float | None = None) -> RawFeatures:
    """Parse a feature file; ``fps`` is its frame rate, as the table or a setting gives it.

    Raises:
        PoseError: it holds no array of features; its frame rate is unknown, or another than ``fps``.
        UserError: a package that reads it is not installed.
    """
    values, claimed = _read(content)
    return RawFeatures(values, _rate(claimed, fps))


def features_width(content: bytes) -> int:
    """Numbers of a frame of a feature file; raises as :func:`read_features` does, but for frame rates."""
    return int(_read(content)[0].shape[1])


def _read(content: bytes) -> tuple[npt.NDArray[Any], float | None]:
    content = decompress(content)
    try:
        arrays, claimed = _read_arrays(content)
    except (PoseError, UserError):
        raise
    except Exception as error:  # damaged files raise too many kinds of errors to name them
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise PoseError(f"the features cannot be read: {reason}") from error
    return _choose(arrays), claimed


def check_duration(features: RawFeatures, seconds: float) -> None:
    """Raise PoseError where features do not last as long as the poses of their clip: a frame rate is wrong."""
    own = features.num_frames / features.fps
    if abs(own - seconds) > LARGEST_DIFFERENCE * seconds + ALLOWED_SECONDS:
        raise PoseError(
            f"frame rates disagree: {features.num_frames} frames of features at {features.fps:g} fps last {own:.1f} s, "
            f"and the poses {seconds:.1f} s",
            _SET_RATE,
        )


def _read_arrays(content: bytes) -> tuple[Mapping[str, Any], float | None]:
    """The arrays of a file by name, and the frame rate that it claims."""
    if content.startswith(NPY):
        return {FEATURE_NAMES[0]: read_npy(content)}, None
    if content.startswith(ZIP):
        arrays = read_npz(content, (*FEATURE_NAMES, RATE_NAME))
        rate = arrays.pop(RATE_NAME, None)
        return arrays, None if rate is None else float(np.asarray(rate).item())
    if content.startswith(HDF5):
        arrays, rate = read_hdf5(content, FEATURE_NAMES, RATE_NAME)
        return arrays, None if rate is None else float(rate)
    if content[8:9] == b"{":
        return _read_safetensors(content)
    raise PoseError("not a .npy, .npz, .h5 or .safetensors file")


def _read_safetensors(content: bytes) -> tuple[Mapping[str, Any], float | None]:
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(content))
    except SafetensorError as error:
        raise PoseError(f"the features cannot be read: {error}") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    rate = header.get("__metadata__", {}).get(RATE_NAME)
    arrays = {}
    for name, tensor in tensors.items():
        dtype = _SAFETENSORS_DTYPES.get(tensor["dtype"])
        if dtype is not None:
            values = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
            if tensor["dtype"] == _BFLOAT16:  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            arrays[name] = values
    return arrays, None if rate is None else float(rate)


def _name_of(arrays: Mapping[str, Any]) -> str | None:
    """The name of the array with the features: an accepted one, or that of the only array."""
    named = next((name for name in FEATURE_NAMES if name in arrays), None)
    return next(iter(arrays)) if named is None and len(arrays) == 1 else named


def _choose(arrays: Mapping[str, Any]) -> npt.NDArray[Any]:
    name = _name_of(arrays)
    if name is None:
        holds = ", ".join(sorted(arrays)[:5]) or "none"
        raise PoseError(f"no array is named {FEATURE_NAMES[0]}: the file holds {holds}", "write one array a file")
    values = arrays[name]
    if values is None or values.dtype.kind not in "fiu":
        raise PoseError(f"the array {name} holds no numbers")
    shape = tuple(values.shape)
    if len(shape) == 3 and shape[0] == 1:  # a batch of one clip
        values = values[0]
    if values.ndim != 2 or 0 in values.shape:
        raise PoseError(f"the features have the shape {list(shape)}, wanted [frames, dimensions]")
    return values


def _rate(claimed: float | None, given: float | None) -> float:
    """The frame rate of a file that claims one or not, where table or settings give another or none."""
    fps = given if given is not None else claimed
    if fps is None:
        raise PoseError("the frame rate of the features is not known", _SET_RATE)
    if claimed is not None and abs(fps - claimed) > 0.01 * claimed:
        raise PoseError(f"frame rates disagree: the file says {claimed:g} fps, and {fps:g} was given", _SET_RATE)
    if not _RATES[0] <= fps <= _RATES[1]:
        raise PoseError(f"features of {fps:g} frames per second", _SET_RATE)
    return float(fps)
