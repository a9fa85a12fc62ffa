"""The signer is followed through lists that put people in another order in every frame."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.people import follow_signer, locate_people

SET = load_landmark_set("hands_body_50")


def _two(frames: int, apart: float = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Two people who stand ``apart`` and move a little; the first is seen better."""
    rng = np.random.default_rng(0)
    values = np.tile(rng.uniform(100, 400, (1, 2, 30, 2)), (frames, 1, 1, 1)).astype(np.float32)
    values += rng.normal(0, 3, values.shape).astype(np.float32)
    values[:, 1, :, 0] += apart
    confidence = np.ones(values.shape[:3], np.float32)
    confidence[:, 1] = 0.6
    return values, confidence


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_the_signer_is_followed_when_people_change_places(frames: list[tuple[bool, bool, bool]]) -> None:
    values, confidence = _two(len(frames))
    for frame, (swapped, first_is_there, second_is_there) in enumerate(frames):
        there = np.array([first_is_there, second_is_there]) if frame else np.array([True, True])
        confidence[frame, ~there] = 0
        if swapped and frame:
            values[frame], confidence[frame] = values[frame, ::-1], confidence[frame, ::-1]
    found = follow_signer(locate_people(values, confidence, confidence > 0))
    score = (values[np.arange(len(frames)), found].mean(axis=(1, 2)) < 500)[found >= 0]
    expected = [i for i, (_, first, _) in enumerate(frames) if first or not i]
    others = [i for i, (_, _, second) in enumerate(frames) if second or not i]
    signer, other = len(expected), 0.6 * len(others)
    if signer == other:
        return
    assert score.all() if signer > other else not score.any()
    assert np.flatnonzero(found >= 0).tolist() == (expected if signer > other else others)


def test_one_person_who_moves_far_stays_the_same_person() -> None:
    values, confidence = _two(10)
    values[5:, 0] += 700  # the camera is turned
    confidence[:, 1] = 0
    assert follow_signer(locate_people(values, confidence, confidence > 0)).tolist() == [0] * 10


def test_people_in_one_place_keep_their_places() -> None:
    values, confidence = _two(10, apart=0)
    assert follow_signer(locate_people(values, confidence, confidence > 0)).tolist() == [0] * 10


@pytest.mark.parametrize("version", [0.0, 0.1, 0.2])
def test_features_of_a_person_that_changes_places(pose_file, version: float) -> None:
    alone, _ = pose_file.body()
    data, confidence = pose_file.body(people=2)
    data[:, 1, :, 0] += 1000
    confidence[:, 1, 30:] = 0
    data[4:7], confidence[4:7] = data[4:7, ::-1].copy(), confidence[4:7, ::-1].copy()
    data[8, 0] = data[8, 1]
    confidence[8, 1] = 0  # the other alone: the signer is not seen
    confidence[8, 0, 30:] = 0
    values = extract_features(pose_file.bytes(data, confidence, version=version), SET, 25).values
    expected = extract_features(pose_file.bytes(alone, np.ones(alone.shape[:3], np.float32)), SET, 25).values
    assert np.isnan(values[8]).all()
    np.testing.assert_allclose(np.delete(values, 8, axis=0), np.delete(expected, 8, axis=0), atol=1e-5)
