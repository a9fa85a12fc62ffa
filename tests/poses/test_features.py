import numpy as np
import pytest

from toolkit.corpus.demo import find_lexicon
from toolkit.poses.features import extract_features, interpolate_frames
from toolkit.poses.landmarks import landmark_set_names, load_landmark_set
from toolkit.poses.pose_file import PoseError

SET = load_landmark_set("hands_body_50")
LEFT_SHOULDER, RIGHT_SHOULDER = 2, 3
LEFT_HAND = list(SET.parts["left_hand"])


def _features(pose_file, data, confidence):
    return extract_features(pose_file.bytes(data, confidence), SET, 25)


def test_shoulders_set_origin_and_unit(pose_file) -> None:
    features = _features(pose_file, *pose_file.body())
    assert features.normalised_by == "shoulders"
    np.testing.assert_allclose(features.values[:, LEFT_SHOULDER, :2], [[0.5, 0]] * 10, atol=1e-6)
    np.testing.assert_allclose(features.values[:, RIGHT_SHOULDER, :2], [[-0.5, 0]] * 10, atol=1e-6)


def test_camera_position_and_distance_do_not_show(pose_file) -> None:
    data, confidence = pose_file.body()
    moved = data * 1.7 + np.float32([40, -90, 0])
    np.testing.assert_allclose(
        _features(pose_file, data, confidence).values, _features(pose_file, moved, confidence).values, atol=1e-4
    )


def test_missing_is_nan_in_every_channel_and_never_a_place(pose_file) -> None:
    data, confidence = pose_file.body()
    hand = slice(pose_file.at("WRIST", "LEFT_HAND_LANDMARKS"), pose_file.at("WRIST", "RIGHT_HAND_LANDMARKS"))
    data[:, :, hand], confidence[:, :, hand] = 0, 0
    values = _features(pose_file, data, confidence).values
    assert np.isnan(values[:, LEFT_HAND]).all()
    assert np.isfinite(np.delete(values, LEFT_HAND, axis=1)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_no_place_at_confidence_one_is_missing(pose_file, poison: float) -> None:
    data, confidence = pose_file.body()
    data[4, 0, pose_file.at("LEFT_WRIST"), 1] = poison
    values = _features(pose_file, data, confidence).values
    assert np.isnan(values[4, 6]).all()
    assert np.isfinite(np.delete(values.reshape(-1, 3), 4 * 50 + 6, axis=0)).all()


def test_one_masked_shoulder_does_not_mask_the_clip(pose_file) -> None:
    data, confidence = pose_file.body()
    confidence[:9, :, pose_file.at("LEFT_SHOULDER")] = 0
    features = _features(pose_file, data, confidence)
    assert features.normalised_by == "shoulders"
    assert np.isfinite(features.values[:, RIGHT_SHOULDER]).all()


def test_without_shoulders_the_spread_is_the_unit(pose_file) -> None:
    data, confidence = pose_file.body()
    confidence[:, :, pose_file.at("LEFT_SHOULDER")] = 0
    features = _features(pose_file, data, confidence)
    assert features.normalised_by == "spread"
    shown = features.values[np.isfinite(features.values).all(axis=2)]
    assert np.abs(shown[:, :2]).max() < 2
    np.testing.assert_allclose(np.median(shown[:, :2], axis=0), 0, atol=1e-3)


def test_a_clip_that_shows_nothing_is_refused(pose_file) -> None:
    data, confidence = pose_file.body()
    with pytest.raises(PoseError, match="visible"):
        _features(pose_file, data, 0 * confidence)


def test_of_several_people_the_most_visible(pose_file) -> None:
    data, confidence = pose_file.body(people=3)
    confidence[:, 0, 20:] = 0
    confidence[:, 2, 5:] = 0
    data[:, 1, :, 0] += 1000
    data[:, 1, pose_file.at("LEFT_SHOULDER"), 0] = 1400
    np.testing.assert_allclose(_features(pose_file, data, confidence).values[0, RIGHT_SHOULDER, 0], -0.5)
    assert np.isfinite(_features(pose_file, data, confidence).values).all()


@pytest.mark.parametrize(("own", "wanted", "frames"), [(25, 12.5, 5), (30, 12.5, 4), (24, 25, 10), (25, 25, 10)])
def test_resampling_keeps_time(pose_file, own: float, wanted: float, frames: int) -> None:
    data, confidence = pose_file.body()
    wrist = pose_file.at("LEFT_WRIST")
    data[:, 0, wrist, 0] = 250 + 100 * np.arange(10) / own  # one shoulder width a second
    values = extract_features(pose_file.bytes(data, confidence, fps=own), SET, wanted).values
    assert len(values) == frames
    np.testing.assert_allclose(values[:, 6, 0], np.arange(frames) / wanted, atol=1e-5)


def test_resampling_between_missing_neighbours() -> None:
    values = np.arange(6, dtype=np.float32).reshape(6, 1, 1)
    visible = np.array([1, 1, 0, 1, 0, 0], bool)[:, None]
    sampled, seen = interpolate_frames(values, visible, np.array([0.5, 1.25, 1.75, 2.75, 3.25, 4.5]))
    assert seen[:, 0].tolist() == [True, True, False, True, True, False]
    np.testing.assert_allclose(sampled[seen][:, 0], [0.5, 1, 3, 3])


def test_lengths_have_policies(pose_file) -> None:
    content = pose_file.bytes(*pose_file.body(frames=50))
    subsampled = extract_features(content, SET, 25, max_frames=10)
    truncated = extract_features(content, SET, 25, max_frames=10, too_long="cut")
    assert len(subsampled.values) == len(truncated.values) == 10 and subsampled.shortened and truncated.shortened
    with pytest.raises(PoseError, match=r"50 frames .*most 10 "):
        extract_features(content, SET, 25, max_frames=10, too_long="reject")
    with pytest.raises(PoseError, match=r"50 frames .*least 51 "):
        extract_features(content, SET, 25, min_frames=51)


def test_a_file_without_z_is_rejected(pose_file) -> None:
    with pytest.raises(PoseError, match=" z "):
        _features(pose_file, *pose_file.body(dims=2))


def test_depth_in_widths_of_the_picture_becomes_pixels(pose_file) -> None:
    data, confidence = pose_file.body()
    data[..., 2] = 0
    tip = pose_file.at("INDEX_FINGER_TIP", "LEFT_HAND_LANDMARKS")
    data[:, 0, tip, 2] = -0.1  # of 500 pixels, of which the shoulders take 100
    np.testing.assert_allclose(_features(pose_file, data, confidence).values[:, 16, 2], -0.5, atol=1e-5)


def test_depth_of_a_hand_is_relative_to_its_wrist(pose_file) -> None:
    data, confidence = pose_file.body()
    data[:, :, slice(11, 32), 2] += 77
    values = _features(pose_file, data, confidence).values
    np.testing.assert_allclose(values[:, LEFT_HAND[0], 2], 0)


def test_hands_visible_counts_frames(pose_file) -> None:
    data, confidence = pose_file.body()
    confidence[5:, :, 11:] = 0
    assert _features(pose_file, data, confidence).hands_visible == 0.5


def test_what_a_file_lacks_is_named(pose_file, tmp_path) -> None:
    (tmp_path / "face.yaml").write_text("parts: {face: {component: FACE_LANDMARKS, points: [0, 1, 2, 3]}}")
    with pytest.raises(PoseError, match=r"4 points .*face: FACE_LANDMARKS/0"):
        extract_features(pose_file.bytes(*pose_file.body()), load_landmark_set(str(tmp_path / "face.yaml")), 25)


def test_confidence_channel_and_anchor(pose_file, tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(
        "channels: [x, y, confidence]\nmin_confidence: 0.3\nparts:\n"
        "  hand: {component: LEFT_HAND_LANDMARKS, points: [WRIST, THUMB_TIP], anchor: WRIST}\n"
    )
    data, confidence = pose_file.body()
    wrist, tip = (pose_file.at(point, "LEFT_HAND_LANDMARKS") for point in ("WRIST", "THUMB_TIP"))
    data[:, 0, wrist, :2] = [10, 20]
    data[:, 0, tip, :2] = [60, 70]
    confidence[:, 0, tip] = 0.8
    confidence[3, 0, tip] = 0.3
    confidence[4, 0, wrist] = 0.1
    content = pose_file.bytes(data, confidence)
    values = extract_features(content, load_landmark_set(str(tmp_path / "own.yaml")), 25).values
    np.testing.assert_allclose(values[0], [[0, 0, 1], [0.5, 0.5, 0.8]], atol=1e-6)
    assert np.isnan(values[3, 1]).all() and np.isnan(values[4]).all() and np.isfinite(values[3, 0]).all()


def test_landmarks_that_a_file_lacks_are_missing_and_named(pose_file) -> None:
    features = extract_features(pose_file.bytes(*pose_file.body()), load_landmark_set("youtube_asl_85"), 25)
    assert len(features.lacking) == 37 and {component for component, _ in features.lacking} == {"FACE_LANDMARKS"}
    assert np.isnan(features.values[:, 48:]).all() and np.isfinite(features.values[:, :48]).all()


@pytest.mark.parametrize("name", landmark_set_names())
def test_every_set_reads_a_full_holistic_file(name: str) -> None:
    landmarks = load_landmark_set(name)
    content = next(find_lexicon().glob("ase/*.pose")).read_bytes()
    features = extract_features(content, landmarks, 12.5)
    assert features.values.shape[1:] == (landmarks.num_points, landmarks.num_channels)
    assert bool(features.lacking) == (name == "unisign_69")
