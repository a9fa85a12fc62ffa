"""A pose encoder's weights out of another's: by landmark, channel and part of the body, all by name.

The first layer of ``linear``, ``conv`` and ``conformer`` has a column for each channel of each landmark and one for
whether it is seen. ``stgcn`` has rows, columns and edges for each node of a part's graph, and a column of its last
layer for each value of a part.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from toolkit.models.encoders.parts import Part, part_groups
from toolkit.models.warm_start.mapping import Axis, Mapping, by_name
from toolkit.poses.landmarks import LandmarkSet

VISIBILITY = "visible"


@dataclass(frozen=True)
class Landmarks:
    """How the landmarks of a run and of the source differ."""

    shared: int  # landmarks that both have
    new: tuple[tuple[str, str], ...]  # (component, point) of those that the source has not seen
    dropped: int  # the source's that the run does not have


def compare(wanted: LandmarkSet, known: LandmarkSet) -> Landmarks:
    """Compare two sets by the names of their landmarks."""
    new = tuple(point for point in wanted.points if known.position(*point) is None)
    shared = wanted.num_points - len(new)
    return Landmarks(shared, new, known.num_points - shared)


def mappings(names: list[str], wanted: LandmarkSet, known: LandmarkSet, kind: str, hidden: int) -> dict[str, Mapping]:
    """How each tensor of a pose encoder comes from the source's of the same kind and width.

    Args:
        names: of the run's tensors, in the pose encoder.
        wanted, known: the landmarks of the run and of the source.
        kind, hidden: of both encoders, as in a recipe.

    Returns:
        by name; a part of the body that the source lacks has none.
    """
    if kind != "stgcn":
        first = "front.weight" if "front.weight" in names else "front.0.weight"
        inputs = by_name(_inputs(wanted), _inputs(known))
        return {name: Mapping(name, columns=inputs if name == first else None) for name in names}
    return _of_graphs(names, wanted, known, hidden)


def _inputs(landmark_set: LandmarkSet) -> list[Hashable]:
    """The values of a frame in the order in which ``with_visibility`` gives them."""
    return [(point, channel) for point in landmark_set.points for channel in (*landmark_set.channels, VISIBILITY)]


def _of_graphs(names: list[str], wanted: LandmarkSet, known: LandmarkSet, hidden: int) -> dict[str, Mapping]:
    groups, known_groups = part_groups(wanted), part_groups(known)
    found: dict[str, Mapping] = {}
    channels = by_name(wanted.channels, known.channels)
    for group, parts in groups.items():
        # Both hands share their weights, unless a set has them unlike: then each comes from its own.
        origin = next(
            ((other, part) for other, its in known_groups.items() for part in its if part.name == parts[0].name), None
        )
        if origin is None:
            continue
        nodes = by_name(_nodes(wanted, parts[0]), _nodes(known, origin[1]))
        start = f"graphs.{group}."
        for name in (name for name in names if name.startswith(start)):
            own = name.removeprefix(start)
            found[name] = Mapping(f"graphs.{origin[0]}.{own}", *_axes(own, nodes, channels))
    outputs, known_outputs = (
        [(part.name, value) for parts in each.values() for part in parts for value in range(hidden)]
        for each in (groups, known_groups)
    )
    for name in (name for name in names if not name.startswith("graphs.")):
        found[name] = Mapping(name, columns=by_name(outputs, known_outputs) if name == "back.0.weight" else None)
    return found


def _axes(name: str, nodes: Axis, channels: Axis) -> tuple[Axis | None, Axis | None]:
    """Rows and columns of one tensor of a part's graph."""
    match name.rsplit(".", 1)[-1]:
        case "identity" | "missing":
            return nodes, None
        case "adjacency":
            return nodes, nodes
    if name == "readout.weight":
        return None, nodes
    if name == "embedding.project.weight":
        return None, channels
    return None, None


def _nodes(landmark_set: LandmarkSet, part: Part) -> list[Hashable]:
    """What the nodes of a part stand for: its landmarks, and the origins of the parts that are joined to it."""
    return [*landmark_set.points[part.first : part.last], *(("origin", guest) for guest in part.guests)]
