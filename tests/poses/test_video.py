"""Videos become poses where MediaPipe is installed; where it is not, the error says how to install it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video import check_video_support, read_video

INSTALLED = importlib.util.find_spec("mediapipe") is not None and importlib.util.find_spec("mediapipe.python")
with_mediapipe = pytest.mark.skipif(not INSTALLED, reason="the extra [video] is not installed")


@pytest.mark.skipif(bool(INSTALLED), reason="the extra [video] is installed")
def test_without_mediapipe_the_hint_is_how_to_install_it(tmp_path: Path) -> None:
    for call in (check_video_support, lambda: read_video(tmp_path / "clip.mp4")):
        with pytest.raises(UserError, match="MediaPipe") as raised:
            call()
        assert "pip install '.[video]'" in raised.value.hint


def write_video(path: Path, pictures: list[np.ndarray], fps: float) -> Path:
    import cv2

    code = {".mp4": "mp4v", ".webm": "VP80"}[path.suffix]
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, (width, height))
    for picture in pictures:
        writer.write(picture)
    writer.release()
    return path


@with_mediapipe
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_person_in_a_video_becomes_features(tmp_path: Path, suffix: str) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image brings a photograph of a person")
    photograph = data.astronaut()[:, :, ::-1]
    pictures = [np.roll(photograph, int(6 * math.sin(frame / 4)), axis=1) for frame in range(20)]
    pose = read_video(write_video(tmp_path / f"clip{suffix}", pictures, 25))
    assert pose.fps == pytest.approx(25, rel=0.01)
    assert pose.data.shape == (20, 1, 543, 3) and pose.header.width == 512
    landmark_set = load_landmark_set("hands_body_50")
    features = extract_features(pose, landmark_set, 12.5)
    assert features.values.shape == (10, 50, 3) and features.normalised_by == "shoulders"
    left, right = (landmark_set.position("POSE_LANDMARKS", f"{side}_SHOULDER") for side in ("LEFT", "RIGHT"))
    assert left is not None and right is not None
    # A person who faces the camera has the left shoulder on the picture's right, one shoulder width away.
    np.testing.assert_allclose(features.values[:, left, 0] - features.values[:, right, 0], 1, atol=0.1)


@with_mediapipe
def test_a_video_of_nobody_and_a_damaged_one_are_rejected(tmp_path: Path) -> None:
    nobody = [np.full((120, 160, 3), shade, np.uint8) for shade in range(5)]
    with pytest.raises(PoseError, match="person"):
        read_video(write_video(tmp_path / "empty.mp4", nobody, 25))
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(PoseError, match="opened"):
        read_video(damaged)
