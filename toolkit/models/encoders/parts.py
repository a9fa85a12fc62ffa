"""The parts of a landmark set as graphs: nodes, edges, origins, and which of them share weights; by names alone."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.poses.landmarks import LandmarkSet

BODY = "body"
HANDS = ("left_hand", "right_hand")
FACE = "face"
# The landmark that a part is relative to, the first of them that the set has. A mesh has its tip of the nose at 4 (or,
# a little higher, 1), the face of COCO-WholeBody and OpenPose at 30.
ORIGINS = {
    "left_hand": (("LEFT_HAND_LANDMARKS", "WRIST"),),
    "right_hand": (("RIGHT_HAND_LANDMARKS", "WRIST"),),
    FACE: (("FACE_LANDMARKS", "4"), ("FACE_LANDMARKS", "1"), ("FACE_68", "30"), ("POSE_LANDMARKS", "NOSE")),
}
# The landmark of the body that a part is joined to, the first of them that the set has.
JOINTS = {"left_hand": ("LEFT_WRIST", "LEFT_ELBOW"), "right_hand": ("RIGHT_WRIST", "RIGHT_ELBOW"), FACE: ("NOSE",)}


@dataclass(frozen=True)
class Part:
    """One part of the body as a graph."""

    name: str  # as the landmark set calls it
    first: int  # its landmarks stand at ``first .. last - 1`` in the set
    last: int
    edges: tuple[tuple[int, int], ...]  # pairs of nodes, counted from the part's first
    origin: int | None = None  # index in the set of what its coordinates are relative to; None = its own mean
    is_relative: bool = False  # the encoder makes them so; not where the features are already
    is_mirrored: bool = False  # x changes its sign, so that a right hand looks like a left one
    guests: tuple[str, ...] = ()  # parts whose origins are further nodes, after the landmarks

    @property
    def num_nodes(self) -> int:
        return self.last - self.first + len(self.guests)

    def adjacency(self) -> list[list[float]]:
        """Share of each neighbour (column) in what a node (row) gets; rows sum to one.

        Without any edges all nodes are neighbours; a node without neighbours has itself.
        """
        nodes = range(self.num_nodes)
        pairs = {*self.edges, *((end, start) for start, end in self.edges)}
        if not pairs:
            pairs = {(start, end) for start in nodes for end in nodes}
        neighbours = [[other for other in nodes if (node, other) in pairs] or [node] for node in nodes]
        return [[(other in near) / len(near) for other in nodes] for near in neighbours]


def part_groups(landmark_set: LandmarkSet) -> dict[str, tuple[Part, ...]]:
    """The parts of a set by the weights that they share: ``hands`` (both, if alike), and each other part by itself."""
    parts = {name: _part(landmark_set, name) for name in landmark_set.parts if name != BODY}
    body = _body(landmark_set, [name for name, part in parts.items() if part.is_relative])
    groups: dict[str, tuple[Part, ...]] = {BODY: (body,)} if body else {}
    left, right = (parts.get(name) for name in HANDS)
    if left and right and (left.num_nodes, left.edges) == (right.num_nodes, right.edges):
        groups["hands"] = (left, right)
    shared = {part.name for part in groups.get("hands", ())}
    return groups | {name: (part,) for name, part in parts.items() if name not in shared}


def _part(landmark_set: LandmarkSet, name: str) -> Part:
    first, last = _span(landmark_set, name)
    known = (landmark_set.position(*point) for point in ORIGINS.get(name, ()))
    is_anchored = name in (landmark_set.anchors or {})
    return Part(
        name,
        first,
        last,
        _edges(landmark_set, first, last),
        origin=next((index for index in known if index is not None), None),
        is_relative=name in ORIGINS and not is_anchored,
        is_mirrored=name == HANDS[1],
    )


def _body(landmark_set: LandmarkSet, guests: list[str]) -> Part | None:
    """The body with the origins of the parts that are relative to them; None for a set that has neither."""
    first, last = _span(landmark_set, BODY) if BODY in landmark_set.parts else (0, 0)
    if not (last - first) + len(guests):
        return None
    edges = list(_edges(landmark_set, first, last))
    names = {point: index - first for index, (_, point) in enumerate(landmark_set.points) if first <= index < last}
    for number, guest in enumerate(guests):
        joint = next((names[joint] for joint in JOINTS[guest] if joint in names), None)
        if joint is not None:
            edges.append((joint, last - first + number))
    return Part(BODY, first, last, tuple(edges), guests=tuple(guests))


def _span(landmark_set: LandmarkSet, name: str) -> tuple[int, int]:
    """First landmark of a part and the one after its last."""
    indices = landmark_set.parts[name]
    if indices != tuple(range(indices[0], indices[0] + len(indices))):
        raise ValueError(f"landmark set {landmark_set.name}: the landmarks of part {name} are not consecutive")
    return indices[0], indices[-1] + 1


def _edges(landmark_set: LandmarkSet, first: int, last: int) -> tuple[tuple[int, int], ...]:
    inside = range(first, last)
    return tuple((start - first, end - first) for start, end in landmark_set.edges if start in inside and end in inside)
