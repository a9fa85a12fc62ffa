"""Landmark sets: which named points of a pose file become features, and how they are connected.

Points are selected by component and point name, never by offset, because public files of "holistic" poses hold
between 178 and 586 points. A set is a YAML file; those of the toolkit are in ``landmark_sets/``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import UserError

SETS_FOLDER = Path(__file__).parent / "landmark_sets"
CHANNELS = ("x", "y", "z", "confidence")
_KEYS = {"name", "channels", "min_confidence", "parts"}
_PART_KEYS = {"from", "component", "points", "edges", "anchor", "mirror"}
_EXAMPLE = f"compare with {SETS_FOLDER / 'hands_body_50.yaml'}"


@dataclass(frozen=True)
class LandmarkSet:
    """An ordered choice of landmarks."""

    name: str  # what recipes and corpora call it
    points: tuple[tuple[str, str], ...]  # (component, point) of each landmark, in the order of the features
    parts: dict[str, tuple[int, ...]]  # indices of the landmarks of body, left_hand, right_hand, face or others
    mirror: tuple[int, ...]  # the index of the left-right counterpart of each (its own where it has none)
    edges: tuple[tuple[int, int], ...]  # pairs of indices that a skeleton drawing connects
    channels: tuple[str, ...] = ("x", "y", "z")  # what each holds: x, y, then optionally z and confidence
    min_confidence: float = 0.0  # a landmark at or below it is missing
    anchors: dict[str, int] | None = None  # part -> landmark of the same frame that its coordinates are relative to

    @property
    def num_points(self) -> int:
        return len(self.points)

    @property
    def num_channels(self) -> int:
        return len(self.channels)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one frame: points and channels."""
        return self.num_points, self.num_channels

    @property
    def width(self) -> int:
        """Values of one frame: points x channels."""
        return self.num_points * self.num_channels

    def position(self, component: str, point: str) -> int | None:
        """The index of a landmark in the set, None if the set lacks it."""
        return self._positions.get((component, point))

    @cached_property
    def _positions(self) -> dict[tuple[str, str], int]:
        return {point: index for index, point in enumerate(self.points)}

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What the numbers of a feature mean; names and drawings of sets do not matter to a model."""
        relative = {part: self.parts[part] for part in self.anchors or {}}
        return self.points, self.channels, self.anchors or {}, relative

    @property
    def in_words(self) -> str:
        """Name, size and channels, for messages."""
        relative = f", {' and '.join(self.anchors)} relative to an anchor" if self.anchors else ""
        return f"{self.name} ({self.num_points} points, {' '.join(self.channels)}{relative})"

    def to_dict(self) -> dict[str, Any]:
        """This set as plain JSON types; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LandmarkSet:
        """The set that ``to_dict`` wrote, also after JSON has made lists of its tuples."""
        return cls(
            name=values["name"],
            points=tuple((component, point) for component, point in values["points"]),
            parts={part: tuple(indices) for part, indices in values["parts"].items()},
            mirror=tuple(values["mirror"]),
            edges=tuple((start, end) for start, end in values["edges"]),
            channels=tuple(values["channels"]),
            min_confidence=values["min_confidence"],
            anchors=values.get("anchors"),
        )


NO_LANDMARKS = LandmarkSet(name="none", points=(), parts={}, mirror=(), edges=())
"""Of corpora that hold features of another network and no poses."""


def landmark_set_names() -> list[str]:
    """The sets that come with the toolkit."""
    return sorted(path.stem for path in SETS_FOLDER.glob("*.yaml"))


def load_landmark_set(name_or_path: str) -> LandmarkSet:
    """Load a set by its name, or a user's own from a YAML file.

    Raises:
        UserError: there is no such set, or its file is malformed.
    """
    path = SETS_FOLDER / f"{name_or_path}.yaml"
    if name_or_path not in landmark_set_names():
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            known = ", ".join(landmark_set_names())
            raise UserError(f"there is no landmark set '{name_or_path}'", f"choose one of {known}, or give a YAML file")
    try:
        return _from_yaml(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"the landmark set {path} is not readable YAML: {' '.join(str(error).split())}",
            "correct the file at that place",
        ) from error


def _from_yaml(content: Any, path: Path) -> LandmarkSet:
    """Flatten the parts of a YAML file into one numbered list of landmarks."""
    if not isinstance(content, dict) or not isinstance(content.get("parts"), dict) or not content["parts"]:
        raise UserError(f"the landmark set {path} has no mapping `parts`", _EXAMPLE)
    _refuse_unknown(content, _KEYS, path, "")
    channels = tuple(content.get("channels", ("x", "y", "z")))
    if channels != tuple(channel for channel in CHANNELS if channel in channels) or channels[:2] != ("x", "y"):
        raise UserError(
            f"the landmark set {path} has the channels {', '.join(map(str, channels))}",
            "write x, y, then optionally z and confidence, in this order",
        )

    points: list[tuple[str, str]] = []
    parts: dict[str, tuple[int, ...]] = {}
    edges: list[tuple[int, int]] = []
    anchors: dict[str, int] = {}
    given_mirrors: dict[tuple[str, str], tuple[str, str]] = {}
    for part, spec in content["parts"].items():
        if isinstance(spec, dict) and "from" in spec:
            spec = _part_of(str(spec["from"]), part, path) | {key: spec[key] for key in spec if key != "from"}
        if not isinstance(spec, dict) or not spec.get("component") or not spec.get("points"):
            raise UserError(f"the landmark set {path}: part '{part}' lacks `component` or `points`", _EXAMPLE)
        _refuse_unknown(spec, _PART_KEYS, path, f"part '{part}': ")
        component, names = str(spec["component"]), [str(point) for point in spec["points"]]
        index = {name: len(points) + offset for offset, name in enumerate(names)}
        if len(index) != len(names):
            raise UserError(f"the landmark set {path}: part '{part}' names a point twice", "name each point once")
        points += [(component, name) for name in names]
        parts[part] = tuple(index.values())
        try:
            edges += [(index[str(start)], index[str(end)]) for start, end in spec.get("edges", [])]
            if "anchor" in spec:
                anchors[part] = index[str(spec["anchor"])]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"the landmark set {path}: part '{part}': edge or anchor {error} is not one of its points",
                "add the point to `points`, or remove the edge or anchor",
            ) from error
        for left, right in spec.get("mirror", []):
            given_mirrors[component, str(left)] = (component, str(right))
            given_mirrors[component, str(right)] = (component, str(left))
    if len(set(points)) != len(points):
        raise UserError(f"the landmark set {path} has a landmark in two parts", "name each landmark in one part")

    position = {point: index for index, point in enumerate(points)}
    mirror = tuple(
        position.get(given_mirrors.get(point, _counterpart(point)), index) for index, point in enumerate(points)
    )
    return LandmarkSet(
        name=str(content.get("name", path.stem)),
        points=tuple(points),
        parts=parts,
        mirror=mirror,
        edges=tuple(edges),
        channels=channels,
        min_confidence=float(content.get("min_confidence", 0.0)),
        anchors=anchors or None,
    )


def _part_of(name: str, part: Any, path: Path) -> dict[str, Any]:
    """A part as another set of the toolkit defines it."""
    if name not in landmark_set_names():
        raise UserError(
            f"the landmark set {path}: part '{part}' comes from '{name}', which is none of the toolkit's sets",
            f"choose one of {', '.join(landmark_set_names())}",
        )
    parts = yaml.safe_load((SETS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["parts"]
    if "component" not in parts.get(part, {}):
        raise UserError(
            f"the landmark set {path}: {name} does not define a part '{part}' itself", "take it from a set that does"
        )
    return dict(parts[part])


def _counterpart(point: tuple[str, str]) -> tuple[str, str]:
    """The name of a landmark on the other side of the body; mesh points of the face need a `mirror:` list instead."""
    swap = {"LEFT": "RIGHT", "RIGHT": "LEFT"}
    component, name = ("_".join(swap.get(word, word) for word in text.split("_")) for text in point)
    return component, name


def _refuse_unknown(mapping: dict[str, Any], allowed: set[str], path: Path, where: str) -> None:
    unknown = sorted(str(key) for key in set(mapping) - allowed)
    if unknown:
        raise UserError(
            f"the landmark set {path}: {where}unknown keys {', '.join(unknown)}",
            f"known keys are {', '.join(sorted(allowed))}",
        )
