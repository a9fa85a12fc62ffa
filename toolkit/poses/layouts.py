"""The names of points: what MediaPipe, OpenPose and COCO-WholeBody (RTMPose) call the same place on the body.

Landmark sets use MediaPipe's names. Points of the other two families are renamed when a file is read, as far as they
show the same places, and arrays without names get theirs from the number of their points.
"""

from __future__ import annotations

from functools import lru_cache

Point = tuple[str, str]  # component, name

BODY = "POSE_LANDMARKS"
FACE = "FACE_LANDMARKS"
LEFT_HAND = "LEFT_HAND_LANDMARKS"
RIGHT_HAND = "RIGHT_HAND_LANDMARKS"
WORLD = "POSE_WORLD_LANDMARKS"
FACE_68 = "FACE_68"
"""The face of OpenPose and COCO-WholeBody: the 68 points of iBUG 300-W, named by their numbers from 0."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MEDIAPIPE_BODY = _names(
    "NOSE LEFT_EYE_INNER LEFT_EYE LEFT_EYE_OUTER RIGHT_EYE_INNER RIGHT_EYE RIGHT_EYE_OUTER LEFT_EAR RIGHT_EAR "
    "MOUTH_LEFT MOUTH_RIGHT LEFT_SHOULDER RIGHT_SHOULDER LEFT_ELBOW RIGHT_ELBOW LEFT_WRIST RIGHT_WRIST "
    "LEFT_PINKY RIGHT_PINKY LEFT_INDEX RIGHT_INDEX LEFT_THUMB RIGHT_THUMB LEFT_HIP RIGHT_HIP "
    "LEFT_KNEE RIGHT_KNEE LEFT_ANKLE RIGHT_ANKLE LEFT_HEEL RIGHT_HEEL LEFT_FOOT_INDEX RIGHT_FOOT_INDEX"
)
HAND = _names(
    "WRIST THUMB_CMC THUMB_MCP THUMB_IP THUMB_TIP INDEX_FINGER_MCP INDEX_FINGER_PIP INDEX_FINGER_DIP INDEX_FINGER_TIP "
    "MIDDLE_FINGER_MCP MIDDLE_FINGER_PIP MIDDLE_FINGER_DIP MIDDLE_FINGER_TIP RING_FINGER_MCP RING_FINGER_PIP "
    "RING_FINGER_DIP RING_FINGER_TIP PINKY_MCP PINKY_PIP PINKY_DIP PINKY_TIP"
)
_COCO_BODY = _names(
    "NOSE LEFT_EYE RIGHT_EYE LEFT_EAR RIGHT_EAR LEFT_SHOULDER RIGHT_SHOULDER LEFT_ELBOW RIGHT_ELBOW LEFT_WRIST "
    "RIGHT_WRIST LEFT_HIP RIGHT_HIP LEFT_KNEE RIGHT_KNEE LEFT_ANKLE RIGHT_ANKLE LEFT_BIG_TOE LEFT_SMALL_TOE LEFT_HEEL "
    "RIGHT_BIG_TOE RIGHT_SMALL_TOE RIGHT_HEEL"
)
_OPENPOSE_BODY = _names(
    "NOSE NECK RIGHT_SHOULDER RIGHT_ELBOW RIGHT_WRIST LEFT_SHOULDER LEFT_ELBOW LEFT_WRIST MID_HIP RIGHT_HIP RIGHT_KNEE "
    "RIGHT_ANKLE LEFT_HIP LEFT_KNEE LEFT_ANKLE RIGHT_EYE LEFT_EYE RIGHT_EAR LEFT_EAR LEFT_BIG_TOE LEFT_SMALL_TOE "
    "LEFT_HEEL RIGHT_BIG_TOE RIGHT_SMALL_TOE RIGHT_HEEL"
)

# Components of other families: our component and the names of their points in order.
_COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pose_keypoints_2d": (BODY, _OPENPOSE_BODY),
    "face_keypoints_2d": (FACE_68, tuple(map(str, range(70)))),
    "hand_left_keypoints_2d": (LEFT_HAND, HAND),
    "hand_right_keypoints_2d": (RIGHT_HAND, HAND),
    "BODY": (BODY, _COCO_BODY),
    "FACE": (FACE_68, tuple(map(str, range(68)))),
    "LEFT_HAND": (LEFT_HAND, HAND),
    "RIGHT_HAND": (RIGHT_HAND, HAND),
}
# AlphaPose names the same four components of its 133 points so.
_COMPONENTS |= {f"{name}_133": _COMPONENTS[name] for name in ("BODY", "FACE", "LEFT_HAND", "RIGHT_HAND")}


def mediapipe_names(component: str, points: list[str]) -> list[Point]:
    """The points of a component under the names that landmark sets use; unknown components keep their own."""
    known = _COMPONENTS.get(component)
    if known is None or len(known[1]) != len(points):
        return [(component, point) for point in points]
    return [(known[0], point) for point in known[1]]


def _points(component: str, names: tuple[str, ...]) -> tuple[Point, ...]:
    return tuple((component, name) for name in names)


@lru_cache(maxsize=1)
def layouts_by_size() -> dict[int, tuple[Point, ...]]:
    """The points of arrays without names, by the number of points."""
    body, world = _points(BODY, MEDIAPIPE_BODY), _points(WORLD, MEDIAPIPE_BODY)
    hands = _points(LEFT_HAND, HAND) + _points(RIGHT_HAND, HAND)
    layouts = [body + hands]
    for face_points in (468, 478):
        holistic = body + _points(FACE, tuple(map(str, range(face_points)))) + hands
        layouts += [holistic, holistic + world]
    face_68 = _points(FACE_68, tuple(map(str, range(70))))
    layouts += [
        _points(BODY, _COCO_BODY) + face_68[:68] + hands,
        _points(BODY, _OPENPOSE_BODY) + face_68 + hands,
    ]
    return {len(layout): layout for layout in layouts}
