"""Missing points, however a file writes them: an unseen point is NaN, a normalised point at the origin stays."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.corpus.demo import find_lexicon
from toolkit.poses.features import extract_features, recorded_points
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.pose_file import PoseError, read_pose

SET = load_landmark_set("hands_body_50")
HANDS = [*SET.parts["left_hand"], *SET.parts["right_hand"]]
LEFT = list(SET.parts["left_hand"])


def _features(pose_file, data, confidence, **changes):
    return extract_features(pose_file.bytes(data, confidence, **changes), SET, 25)


def _hand(pose_file) -> slice:
    start = pose_file.at("WRIST", "LEFT_HAND_LANDMARKS")
    return slice(start, start + 21)


@pytest.mark.parametrize("version", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("place", [(0, 0, 0), (7, 9, 3), (-250, -200, 0)])
def test_an_unseen_hand_is_missing_wherever_it_was_written(pose_file, place, version: float) -> None:
    data, confidence = pose_file.body()
    hand = _hand(pose_file)
    whole = _features(pose_file, data, confidence, version=version)
    data[:4, :, hand] = place
    features = _features(pose_file, data, confidence, version=version)
    assert np.isnan(features.values[:4, LEFT]).all() and features.without_place == 4 * 21
    np.testing.assert_array_equal(features.values[4:], whole.values[4:])
    assert whole.without_place == 0
    seen = recorded_points(read_pose(pose_file.bytes(data, confidence, version=version)), SET)
    assert np.isnan(seen[:4, LEFT]).all() and np.isfinite(seen[4:]).all()


def test_unseen_hands_are_counted_as_unseen(pose_file) -> None:
    data, confidence = pose_file.body()
    data[:, :, pose_file.at("WRIST", "LEFT_HAND_LANDMARKS") :] = 0
    assert _features(pose_file, data, confidence).hands_visible == 0


def test_all_ways_to_write_nothing_give_the_same_features(pose_file) -> None:
    data, confidence = pose_file.body()
    hand = _hand(pose_file)
    found = []
    for value, claimed in [(0, 0), (0, 1), (np.nan, 1), (5, 1), (3e7, 1), (0, np.nan), (5, np.inf), (1, -1)]:
        changed, marks = data.copy(), confidence.copy()
        changed[2:7, :, hand], marks[2:7, :, hand] = value, claimed
        found.append(_features(pose_file, changed, marks).values)
    for values in found[1:]:
        np.testing.assert_array_equal(values, found[0])


def test_one_point_at_the_corner_of_the_picture_is_missing(pose_file) -> None:
    data, confidence = pose_file.body()
    data[..., 2] = 1
    data[:, :, pose_file.at("LEFT_WRIST")] = 0
    features = _features(pose_file, data, confidence)
    assert np.isnan(features.values[:, 6]).all() and features.without_place == 10
    data[:, :, 0, 0] = -5  # another just outside of the picture
    assert _features(pose_file, data, confidence).without_place == 10


@pytest.mark.parametrize("anchor", ["NOSE", "LEFT_SHOULDER", "RIGHT_SHOULDER"])
def test_the_point_that_others_are_normalised_about_is_not_missing(pose_file, anchor: str) -> None:
    data, confidence = pose_file.body()
    whole = _features(pose_file, data, confidence)
    body, hand = slice(0, 11), _hand(pose_file)
    data[:, :, body] -= data[:, :, pose_file.at(anchor), None]
    data[:, :, hand] -= data[:, :, hand][:, :, :1]
    unseen = pose_file.at("LEFT_HIP")
    data[:, :, unseen], confidence[:, :, unseen] = 0, 0  # one that is known to be missing is no rival
    data[3:5, :, hand] = 0  # a hand that is not seen has no wrist either
    features = _features(pose_file, data, confidence)
    assert features.normalised_by == "shoulders"
    np.testing.assert_allclose(features.values[:, :6, :2], whole.values[:, :6, :2], atol=1e-5)
    wrist = LEFT[0]
    assert np.isnan(features.values[3:5, LEFT]).all() and features.without_place == 2 * 21
    assert np.isfinite(np.delete(features.values[:, wrist], [3, 4], axis=0)).all()


def test_a_clip_of_nobody_is_refused(pose_file) -> None:
    data, confidence = pose_file.body()
    for nothing in (0 * data, 0 * data + 5, 0 * data + np.float32(np.nan)):
        with pytest.raises(PoseError, match="visible"):
            _features(pose_file, nothing, confidence)


def test_of_two_people_the_one_that_is_there(pose_file) -> None:
    data, confidence = pose_file.body(people=2)
    confidence[:, 1, 5:8] = 0
    data[:, 0] = 0
    assert np.isfinite(_features(pose_file, data, confidence).values[:, :3]).all()


def test_arrays_follow_the_same_rule() -> None:
    keypoints = np.random.default_rng(0).uniform(100, 300, (6, 133, 2)).astype(np.float32)
    keypoints[2, 91:112] = 0
    keypoints[3, 91:112] = 17
    landmarks = load_landmark_set("unisign_69")
    features = extract_features(pickle.dumps({"keypoints": keypoints, "scores": np.ones((6, 133))}), landmarks, 25)
    assert np.isnan(features.values[2:4, list(landmarks.parts["left_hand"])]).all()
    assert features.without_place == 2 * 21


def test_real_recordings_lose_no_point() -> None:
    for file in sorted(find_lexicon().glob("*/*.pose"))[:40]:
        content = file.read_bytes()
        assert extract_features(content, SET, 12.5).without_place == 0


def _check_moved_clips(pose_file, examples: int) -> None:
    """In a clip that is moved and scaled, an unseen component is missing exactly where it was not seen."""
    data, confidence = pose_file.body(frames=12)
    rng = np.random.default_rng(1)
    data += rng.normal(0, 2, data.shape).astype(np.float32)
    whole = np.isfinite(_features(pose_file, data, confidence).values).all(axis=2)
    assert whole.all()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda unseen: not all(unseen)),
        st.sampled_from([0.0, 1.0, 0.5]),
        st.floats(0.002, 50),
        st.tuples(st.integers(-900, 900), st.integers(-900, 900), st.integers(-9, 9)),
    )
    def run(unseen: list[bool], claimed: float, scale: float, shift: tuple[int, int, int]) -> None:
        changed, marks = data.copy(), confidence.copy()
        hand = _hand(pose_file)
        changed[unseen, :, hand], marks[unseen, :, hand] = 0, claimed
        changed = (changed * np.float32(scale) + np.float32(shift)).astype(np.float32)
        features = _features(pose_file, changed, marks)
        seen = np.isfinite(features.values).all(axis=2)
        assert not seen[unseen][:, LEFT].any() and seen[np.invert(unseen)].all()
        assert np.delete(seen, LEFT, axis=1).all()
        assert features.without_place == (21 * sum(unseen) if claimed else 0)

    run()


def test_moved_and_scaled_clips_miss_the_same(pose_file) -> None:
    _check_moved_clips(pose_file, 100)


@pytest.mark.nightly
def test_many_moved_and_scaled_clips_miss_the_same(pose_file) -> None:
    _check_moved_clips(pose_file, 5_000)
