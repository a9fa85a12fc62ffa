import json

import pytest

from toolkit.errors import UserError
from toolkit.poses.landmarks import LandmarkSet, landmark_set_names, load_landmark_set


@pytest.mark.parametrize("name", landmark_set_names())
def test_every_set_is_consistent(name: str) -> None:
    landmarks = load_landmark_set(name)
    assert landmarks.name == name
    assert sorted(index for part in landmarks.parts.values() for index in part) == list(range(landmarks.num_points))
    assert all(landmarks.mirror[landmarks.mirror[index]] == index for index in range(landmarks.num_points))
    assert all(0 <= end < landmarks.num_points for edge in landmarks.edges for end in edge)
    assert {"left_hand", "right_hand"} <= set(landmarks.parts)


@pytest.mark.parametrize("name", landmark_set_names())
def test_mirror_swaps_the_hands_point_by_point(name: str) -> None:
    landmarks = load_landmark_set(name)
    left, right = landmarks.parts["left_hand"], landmarks.parts["right_hand"]
    assert tuple(landmarks.mirror[index] for index in left) == right


@pytest.mark.parametrize("name", landmark_set_names())
def test_survives_json(name: str) -> None:
    landmarks = load_landmark_set(name)
    assert LandmarkSet.from_dict(json.loads(json.dumps(landmarks.to_dict()))) == landmarks


def test_hands_body_50_holds_what_its_name_says() -> None:
    landmarks = load_landmark_set("hands_body_50")
    assert (landmarks.num_points, landmarks.num_channels, landmarks.width) == (50, 3, 150)
    assert {part: len(indices) for part, indices in landmarks.parts.items()} == {
        "body": 8,
        "left_hand": 21,
        "right_hand": 21,
    }


OWN = """
name: own
channels: [x, y]
parts:
  body: {component: POSE_LANDMARKS, points: [LEFT_SHOULDER, NOSE, RIGHT_SHOULDER], edges: [[NOSE, LEFT_SHOULDER]]}
  face: {component: FACE_LANDMARKS, points: [61, 291, 0], mirror: [[61, 291]]}
"""


def test_a_users_own_yaml(tmp_path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    landmarks = load_landmark_set(str(tmp_path / "own.yaml"))
    assert landmarks.points[3] == ("FACE_LANDMARKS", "61")
    assert landmarks.mirror == (2, 1, 0, 4, 3, 5)
    assert landmarks.edges == ((1, 0),)
    assert landmarks.channels == ("x", "y")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("parts: {}", "`parts`"),
        ("- 1", "`parts`"),
        ("parts: {a: {component: C}}", "'a' .*`points`"),
        ("parts: {a: {component: C, points: [X, X]}}", "'a' .*twice"),
        ("parts: {a: {component: C, points: [X]}, b: {component: C, points: [X]}}", "parts"),
        ("parts: {a: {component: C, points: [X], edges: [[X, Y]]}}", "'a': edge .*'Y'"),
        ("parts: {a: {component: C, points: [X], limbs: []}}", "'a': .*limbs"),
        ("parts: {a: {component: C, points: [X]}}\nchannels: [x, z, y]", "channels x, z, y"),
        ("parts: {a: [", "YAML.* line 1"),
    ],
)
def test_a_malformed_set_names_the_part(tmp_path, content: str, named: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=named) as raised:
        load_landmark_set(str(tmp_path / "bad.yaml"))
    assert "bad.yaml" in raised.value.message and raised.value.hint


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="hands_body_51") as raised:
        load_landmark_set("hands_body_51")
    assert "hands_body_50" in raised.value.hint
