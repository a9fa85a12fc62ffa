"""Feature files of every form are read alike, and what is wrong with one is said in a line."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from toolkit.poses.landmarks import NO_LANDMARKS
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video_features import RawFeatures, Recording, check_duration, read_features

VALUES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def saved(write: Any, *values: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    write(file, *values, **named)
    return file.getvalue()


FILES = {
    "npy": (saved(np.save, VALUES), 1e-7),
    "float64 npy": (saved(np.save, VALUES.astype(np.float64)), 1e-7),
    "npy of a batch of one": (saved(np.save, VALUES[None]), 1e-7),
    "npz": (saved(np.savez, features=VALUES, other=VALUES[:1]), 1e-7),
    "npz of any name": (saved(np.savez, clip7=VALUES), 1e-7),
    "safetensors": (save({"embeddings": torch.from_numpy(VALUES)}), 1e-7),
    "bfloat16 safetensors": (save({"x": torch.from_numpy(VALUES).bfloat16()}), 2e-2),
    "float16 safetensors": (save({"x": torch.from_numpy(VALUES).half()}), 2e-3),
}


@pytest.mark.parametrize("form", FILES)
def test_every_form_gives_the_same_features(form: str) -> None:
    content, tolerance = FILES[form]
    raw = read_features(content, 25.0)
    assert (raw.num_frames, raw.width, raw.fps) == (6, 4, 25.0)
    np.testing.assert_allclose(raw.values.astype(np.float32), VALUES, atol=tolerance)


@pytest.mark.parametrize(
    "content",
    [
        saved(np.savez, features=VALUES, fps=12.5),
        save({"features": torch.from_numpy(VALUES)}, metadata={"fps": "12.5"}),
    ],
    ids=["npz", "safetensors"],
)
def test_a_frame_rate_in_the_file_is_read_and_contradicts_another(content: bytes) -> None:
    assert read_features(content).fps == read_features(content, 12.5).fps == 12.5
    with pytest.raises(PoseError, match=r"12\.5.*\b25\b") as raised:
        read_features(content, 25.0)
    assert "features_fps" in raised.value.hint


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (saved(np.save, VALUES[:, 0]), r"\[6\]"),
        (saved(np.save, VALUES[:0]), r"\[0, 4\]"),
        (saved(np.save, np.array([{"a": 1}], dtype=object), allow_pickle=True), "objects"),
        (saved(np.savez, a=VALUES, b=VALUES), "a, b"),
        (saved(np.save, np.array([["a"]])), "numbers"),
        (saved(np.save, VALUES)[:-3], r"\(6, 4\)"),
        (FILES["safetensors"][0][:-1], "features"),
        (FILES["npz"][0][:300], "features"),
        (b"\x80\x04}.", r"\.npy"),
        (b"", r"\.npy"),
    ],
    ids=["a vector", "no frames", "objects", "two arrays", "words", "short npy", "short safetensors", "short npz",
         "a pickle", "nothing"],
)  # fmt: skip
def test_what_is_no_file_of_features_is_refused_in_a_line(content: bytes, named: str) -> None:
    with pytest.raises(PoseError, match=named) as raised:
        read_features(content, 25.0)
    assert "\n" not in str(raised.value)


def test_a_frame_rate_that_nobody_gives_or_no_camera_has_is_refused() -> None:
    with pytest.raises(PoseError, match="rate"):
        read_features(FILES["npy"][0])
    with pytest.raises(PoseError, match="5000"):
        read_features(FILES["npy"][0], 5000.0)


@pytest.mark.parametrize(("own", "fps"), [(25.0, 12.5), (10.0, 25.0), (12.5, 12.5), (3.125, 12.5)])
def test_features_are_sampled_at_the_frames_of_the_corpus(own: float, fps: float) -> None:
    """A feature that is the time itself is the time of the frame at which it is sampled."""
    seconds = np.arange(40) / own
    found = Recording(None, RawFeatures(np.stack([seconds, -seconds], axis=1), own)).sampled(NO_LANDMARKS, fps)
    assert found.video_features is not None and found.features.shape == (len(found.video_features), 0, 3)
    expected = np.arange(int(39 / own * fps + 1e-6) + 1) / fps
    np.testing.assert_allclose(found.video_features[:, 0], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.video_features[:, 1], -found.video_features[:, 0])


def test_the_limits_of_length_are_those_of_poses() -> None:
    raw = Recording(None, RawFeatures(VALUES.repeat(10, axis=0), 25.0))
    shortened = raw.sampled(NO_LANDMARKS, 25.0, max_frames=20)
    assert shortened.shortened and len(shortened.features) == 20
    for limit in ({"min_frames": 61}, {"max_frames": 59, "too_long": "reject"}):
        with pytest.raises(PoseError, match=r"\b60 frames"):
            raw.sampled(NO_LANDMARKS, 25.0, **limit)  # type: ignore[arg-type]
    assert raw.between(0.4, 1.2).num_frames == 20


@pytest.mark.parametrize(("value", "named"), [(np.nan, "NaN"), (np.inf, "infinite"), (1e5, r"65,504")])
def test_numbers_that_float16_cannot_hold_are_refused(value: float, named: str) -> None:
    values = VALUES.copy()
    values[3, 2] = value
    with pytest.raises(PoseError, match=named):
        RawFeatures(values, 25.0).at(np.arange(6) / 25.0)


def test_features_last_as_long_as_the_poses() -> None:
    raw = RawFeatures(VALUES.repeat(20, axis=0), 25.0)  # 4.8 s
    for seconds in (4.8, 4.0, 5.5):
        check_duration(raw, seconds)
    with pytest.raises(PoseError, match=r"4\.8 s.*9\.6 s") as raised:
        check_duration(raw, 9.6)
    assert "features_fps" in raised.value.hint
