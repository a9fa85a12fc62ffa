"""Augment training clips: random changes of time, of space and of what is seen.

The changes of a clip depend on its length and random generator alone, so the batch it is in and the process that
prepares it do not matter. Missing landmarks stay missing and padding stays padding.

* in time: temporal crop, speed, time warp and frame drop are composed into one list of source times, read once;
* in space: mirror, rotation, shear and scale are composed into one matrix, then comes translation, then noise;
* in what is seen: landmark drop and hand drop.

What another network made of a clip is read at the same times, and masked for a while (SpecAugment, Park et al. 2019,
arXiv:1904.08779); changes of space are for landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from toolkit.poses.landmarks import LandmarkSet
    from toolkit.recipe.schema import Augmentation

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.integer]

# A dropped hand is hidden for at most this share of the clip, so that every hand is seen.
_LONGEST_HAND_DROP = 0.5
_NOISE_VALUES = 1 << 20


def is_off(settings: Augmentation) -> bool:
    """Whether every strength is zero."""
    return not any(strength for _, strength in settings)


def draw_lengths(
    frames: IntArray, settings: Augmentation, rng: np.random.Generator, *, max_frames: int | None = None
) -> IntArray:
    """Draw the new length of each clip, before batches are formed, so that batches hold clips of similar new lengths.

    Args:
        frames: length of each clip, [clips]; all clips of a split at once.
        settings: strength of each change.
        rng: for all clips together.
        max_frames: a slowed clip grows to this length at most.

    Returns:
        [clips, 2]: frames that temporal crop keeps, and frames that these become by the change of speed.
    """
    frames = np.asarray(frames, dtype=np.int64)
    removed = np.rint(frames * rng.uniform(0.0, settings.temporal_crop, len(frames))).astype(np.int64)
    shortest = np.minimum(frames, 2)
    kept = np.maximum(frames - removed, shortest)
    speed = (1.0 + settings.speed) ** rng.uniform(-1.0, 1.0, len(frames))
    new = np.rint(kept / speed).astype(np.int64)
    if max_frames is not None:
        # A clip that is longer already is not shortened.
        new = np.minimum(new, np.maximum(max_frames, kept))
    return np.stack([kept, np.maximum(new, shortest)], axis=1)


def remaining_frames(frames: IntArray, settings: Augmentation) -> IntArray:
    """What frame drop leaves of clips that have so many frames after the change of speed, [clips].

    The first and last frame stay. The share of dropped frames is exact, so lengths within a batch stay similar.
    """
    return frames - np.rint(settings.frame_drop * np.maximum(np.asarray(frames) - 2, 0)).astype(np.int64)


def augment(
    poses: Tensor,
    visible: Tensor,
    frame_mask: Tensor,
    settings: Augmentation,
    landmark_set: LandmarkSet,
    lengths: IntArray,
    generators: Sequence[np.random.Generator],
    padded_frames: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Change each clip of a batch at random.

    Each clip is computed by itself: it fits into the processor's cache, which a whole batch does not.

    Args:
        poses: float32 [clips, frames, points, channels] on the CPU, in shoulder widths, 0 where missing or padded.
        visible: bool [clips, frames, points].
        frame_mask: bool [clips, frames]; a clip's frames come before its padding.
        settings: strength of each change; 0 = off.
        landmark_set: which points are hands, which are mirror images, what the channels hold.
        lengths: the rows of :func:`draw_lengths` for these clips, [clips, 2].
        generators: one for each clip.
        padded_frames: to pad to, where no clip is longer.

    Returns:
        new tensors like the first three, with as many frames as the longest clip now has, or ``padded_frames``.
    """
    assert poses.shape[2:] == (landmark_set.num_points, landmark_set.num_channels), "poses of another landmark set"
    if is_off(settings):
        return poses, visible, frame_mask

    old_lengths = frame_mask.sum(1).tolist()
    times = [
        _source_times(length, int(kept), int(frames), settings, rng)
        for length, (kept, frames), rng in zip(old_lengths, lengths, generators, strict=True)
    ]
    new_lengths = torch.tensor([len(clip_times) for clip_times in times])
    longest = max(int(new_lengths.max()), padded_frames)
    new_poses = poses.new_zeros(len(poses), longest, *poses.shape[2:])
    new_visible = visible.new_zeros(len(poses), longest, poses.shape[2])
    old_points, old_seen = poses.numpy(), visible.numpy()
    new_points, new_seen = new_poses.numpy(), new_visible.numpy()
    for row, (length, clip_times, rng) in enumerate(zip(old_lengths, times, generators, strict=True)):
        planes, seen = _read_at(old_points[row, :length], old_seen[row, :length], clip_times)
        seen = _hide(seen, settings, landmark_set, rng)
        planes, seen = _move(planes, seen, settings, landmark_set, rng)
        planes *= seen
        new_points[row, : len(clip_times)] = planes.transpose(1, 2, 0)
        new_seen[row, : len(clip_times)] = seen
    return new_poses, new_visible, torch.arange(longest) < new_lengths[:, None]


def augment_features(
    features: Tensor,
    settings: Augmentation,
    old_lengths: Sequence[int],
    lengths: IntArray,
    generators: Sequence[np.random.Generator],
    padded_frames: int,
) -> Tensor:
    """Change what another network made of each clip as :func:`augment` changes its poses in time, and mask a part.

    Args:
        features: float16 [clips, frames, dimensions] on the CPU, 0 where padded.
        settings: strength of each change; 0 = off.
        old_lengths: frames of each clip before.
        lengths: the rows of :func:`draw_lengths` for these clips, [clips, 2].
        generators: one for each clip, in the state in which ``augment`` got it: the drawn times are then the same.
        padded_frames: frames of the poses of the batch after their change.

    Returns:
        a new tensor, [clips, padded frames, dimensions]; frames that are masked are 0.
    """
    new = features.new_zeros(len(features), padded_frames, features.shape[2])
    old_values, new_values = features.numpy(), new.numpy()
    for row, (length, (kept, frames), rng) in enumerate(zip(old_lengths, lengths, generators, strict=True)):
        times = _source_times(length, int(kept), int(frames), settings, rng)
        before = np.floor(times).astype(np.intp)
        values, share = old_values[row][before], (times - before).astype(np.float32)[:, None]
        if share.any():
            after = old_values[row][np.minimum(before + 1, length - 1)]
            new_values[row, : len(times)] = values * (1 - share) + after * share
        else:
            new_values[row, : len(times)] = values
        if settings.feature_mask:
            masked = int(len(times) * rng.uniform(0.0, settings.feature_mask))
            first = rng.integers(0, len(times) - masked + 1)
            new_values[row, first : first + masked] = 0
    return new


def _source_times(
    length: int, kept: int, frames: int, settings: Augmentation, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The position in the source clip of each new frame, in frames; ascending, within 0 .. length - 1."""
    first = rng.integers(0, length - kept + 1)
    if kept == 1 or frames == 1:
        return np.array([first + (kept - 1) / 2])
    times = np.linspace(0.0, kept - 1.0, frames)
    # The slope is 1 + warp * cos(...) with |warp| <= 1: time never runs backwards.
    warp, waves = settings.time_warp * rng.uniform(-1.0, 1.0), np.pi * rng.integers(1, 3) / (kept - 1)
    times += warp * np.sin(waves * times) / waves
    times = first + np.clip(times, 0.0, kept - 1.0)
    dropped = 1 + rng.permutation(frames - 2)[: frames - int(remaining_frames(np.array(frames), settings))]
    return np.delete(times, dropped)


def _read_at(points: FloatArray, seen: BoolArray, times: NDArray[np.float64]) -> tuple[FloatArray, BoolArray]:
    """Interpolate a clip linearly at the given times.

    A landmark is seen where the nearest frame saw it. If the other frame did not, the value of the nearest is used.

    Returns:
        coordinates as planes [channels, frames, points], any value where not seen, and what is seen [frames, points].
    """
    nearest = np.rint(times).astype(np.int64)
    offset = times - nearest
    planes = np.ascontiguousarray(points[nearest].transpose(2, 0, 1))
    if offset.any():
        # Where the offset is 0, `other` is the nearest frame itself, and nothing is added.
        other = nearest + np.sign(offset).astype(np.int64)
        weight = np.abs(offset).astype(np.float32)[:, None] * seen[other]
        step = np.ascontiguousarray(points[other].transpose(2, 0, 1))
        step -= planes
        step *= weight
        planes += step
    return planes, seen[nearest]


def _hide(seen: BoolArray, settings: Augmentation, landmark_set: LandmarkSet, rng: np.random.Generator) -> BoolArray:
    """Hide single landmarks through the clip, and hands for a while."""
    seen = seen & (rng.random(seen.shape[1]) >= settings.landmark_drop)
    for part, points in landmark_set.parts.items():
        if part.endswith("hand") and rng.random() < settings.hand_drop:
            frames = int(np.ceil(len(seen) * rng.uniform(0.0, _LONGEST_HAND_DROP)))
            first = rng.integers(0, len(seen) - frames + 1)
            seen[first : first + frames, list(points)] = False
    return seen


def _move(
    planes: FloatArray, seen: BoolArray, settings: Augmentation, landmark_set: LandmarkSet, rng: np.random.Generator
) -> tuple[FloatArray, BoolArray]:
    """Change where the landmarks are."""
    is_mirrored = rng.random() < settings.mirror
    if is_mirrored:
        counterpart = np.asarray(landmark_set.mirror, np.intp)
        planes, seen = planes.take(counterpart, axis=2), seen.take(counterpart, axis=1)

    spatial = [row for row, channel in enumerate(landmark_set.channels) if channel in ("x", "y", "z")]
    angle = np.deg2rad(settings.rotation) * rng.uniform(-1.0, 1.0)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, settings.shear * rng.uniform(-1.0, 1.0)], [0.0, 1.0]])
    reflection = np.diag([-1.0 if is_mirrored else 1.0, 1.0])
    matrix = np.eye(len(planes))
    matrix[:2, :2] = rotation @ shear @ reflection
    matrix[spatial] *= (1.0 + settings.scale) ** rng.uniform(-1.0, 1.0)
    if (matrix != np.eye(len(planes))).any():
        planes = (matrix.astype(np.float32) @ planes.reshape(len(planes), -1)).reshape(planes.shape)

    for row in (0, 1):
        planes[row] += np.float32(settings.translation * rng.uniform(-1.0, 1.0)) * _absolute_points(landmark_set)
    if settings.noise:
        size = len(spatial) * planes[0].size
        table = _gaussian_noise(max(_NOISE_VALUES, size))
        start = int(rng.integers(0, len(table) - size + 1))
        planes[spatial] += table[start : start + size].reshape(len(spatial), *planes.shape[1:]) * settings.noise
    return planes, seen


def _absolute_points(landmark_set: LandmarkSet) -> FloatArray:
    """1 for landmarks relative to the body, 0 for those relative to an anchor of their own part."""
    absolute = np.ones(landmark_set.num_points, dtype=np.float32)
    for part in landmark_set.anchors or {}:
        absolute[list(landmark_set.parts[part])] = 0.0
    return absolute


@lru_cache(maxsize=1)
def _gaussian_noise(values: int) -> FloatArray:
    """Standard normal values, read from a random place: drawing them for each batch takes longer than all the rest."""
    return np.random.default_rng(0).standard_normal(values, dtype=np.float32)
