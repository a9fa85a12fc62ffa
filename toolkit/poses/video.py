"""Estimate the pose in a video by MediaPipe Holistic, with which most public pose corpora were made.

MediaPipe is the extra ``[video]``. Its release must be older than 0.10.15: later ones do not work with numpy 2, and
from 0.10.30 on they no longer contain Holistic and its model files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from toolkit.errors import UserError
from toolkit.poses.layouts import BODY, FACE, HAND, LEFT_HAND, MEDIAPIPE_BODY, RIGHT_HAND
from toolkit.poses.pose_file import FloatArray, PoseError, PoseHeader, RawPose, checked_fps

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
FACE_POINTS = 468
MOST_VIDEO_FRAMES = 120_000
"""More than an hour at 30 frames a second; 1 GiB of landmarks."""

_INSTALL = "pip install '.[video]' in a clone of the toolkit (or pip install 'mediapipe<0.10.15')"
_PARTS = {
    "pose_landmarks": (BODY, MEDIAPIPE_BODY),
    "face_landmarks": (FACE, tuple(map(str, range(FACE_POINTS)))),
    "left_hand_landmarks": (LEFT_HAND, HAND),
    "right_hand_landmarks": (RIGHT_HAND, HAND),
}
_POINTS = tuple((component, name) for component, names in _PARTS.values() for name in names)
_SIZES = tuple((len(names), 3) for _, names in _PARTS.values())


def check_video_support() -> None:
    """Raise UserError where MediaPipe is not installed, or is a release without Holistic."""
    if importlib.util.find_spec("mediapipe") is None or importlib.util.find_spec("cv2") is None:
        raise UserError("reading a video needs MediaPipe, which is not installed", _INSTALL)
    if importlib.util.find_spec("mediapipe.python") is None:
        raise UserError("reading a video needs MediaPipe Holistic, which this release of MediaPipe lacks", _INSTALL)


def read_video(path: Path, fps: float | None = None) -> RawPose:
    """Find the landmarks of the signer in every frame; some 20 frames a second on one core.

    ``fps``, frames per second, overrules the video.

    Returns:
        a pose of 543 points: x and y in pixels, z in widths of the picture, as pose files have it.

    Raises:
        PoseError: the video cannot be read, or shows nobody.
        UserError: MediaPipe is not installed.
    """
    check_video_support()
    with _without_native_logs() as stderr:
        import cv2
        from mediapipe.python.solutions.holistic import Holistic

        video = cv2.VideoCapture(str(path))
        if not video.isOpened():
            raise PoseError("the video cannot be opened", "check that it plays: it is damaged, or of an unknown format")
        total = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
        frames: list[FloatArray] = []
        width, last_seen = 0, 0.0
        interval = 0.5 if stderr.isatty() else 10.0
        try:
            with (
                Holistic() as holistic,
                tqdm(
                    total=total, desc=path.name, unit=" frames", file=stderr, delay=2, mininterval=interval, leave=False
                ) as bar,
            ):
                while (read := video.read())[0]:
                    if len(frames) == MOST_VIDEO_FRAMES:
                        raise PoseError(
                            f"the video has more than {MOST_VIDEO_FRAMES:,} frames", "split it into shorter ones"
                        )
                    picture = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
                    frames.append(_landmarks(holistic.process(picture), picture.shape[1], picture.shape[0]))
                    width, last_seen = picture.shape[1], video.get(cv2.CAP_PROP_POS_MSEC) / 1000
                    bar.update()
            claimed = video.get(cv2.CAP_PROP_FPS)
        finally:
            video.release()
    if not frames:
        raise PoseError("the video holds no frames")
    data = np.stack([frame[:, :3] for frame in frames])[:, None]
    confidence = np.stack([frame[:, 3] for frame in frames])[:, None]
    if not confidence.any():
        raise PoseError("no person is seen in the video")
    # Phones record at a varying rate and write another into the file: the time of the last frame gives the mean.
    own_fps = (len(frames) - 1) / last_seen if last_seen > 0 and len(frames) > 1 else claimed
    return RawPose(checked_fps(own_fps, fps), PoseHeader(0.0, _POINTS, _SIZES, width), data, confidence)


def _landmarks(found: Any, width: int, height: int) -> FloatArray:
    """One frame's landmarks, float32 [points, x y z confidence]; zeros where a part is not seen."""
    frame = np.zeros((len(_POINTS), 4), np.float32)
    start = 0
    for part, (component, names) in _PARTS.items():
        landmarks = getattr(found, part)
        if landmarks is not None:
            frame[start : start + len(names)] = [
                (point.x * width, point.y * height, point.z, point.visibility if component == BODY else 1.0)
                for point in landmarks.landmark
            ]
        start += len(names)
    return frame


@contextlib.contextmanager
def _without_native_logs() -> Iterator[TextIO]:
    """Hide what C++ libraries log to file descriptor 2; yields a stream that still reaches the terminal."""
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with os.fdopen(os.dup(terminal), "w") as stream:
            yield stream
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
