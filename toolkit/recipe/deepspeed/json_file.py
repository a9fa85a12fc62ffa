"""The DeepSpeed JSONs: read strictly, with overrides merged in, and every unknown key named.

DeepSpeed ignores an unknown key at its top level and drops "auto" inside a section, so both are checked here. Older
spellings are translated (``aliases.py``), and what does nothing or harms is removed (``refusals.py``), before any value
is looked at. What the values mean together is decided in ``resolve.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UserError, as_one
from toolkit.files import read_text
from toolkit.recipe.deepspeed.aliases import PlaceOf, translated
from toolkit.recipe.deepspeed.keys import AUTO_ALLOWED, KNOWN, OPTIMIZER_IMPLEMENTATION, OWNED, RENAMED
from toolkit.recipe.deepspeed.refusals import REFUSED, without_refused_and_idle
from toolkit.recipe.paths import ds_configs_dir, shown
from toolkit.recipe.tree import Tree, did_you_mean, leaves, merge, value_at, without_nulls

# What Python reads a type of ``keys.py`` as, and its name in messages.
_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (int | float, "a finite number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
    "list": (list, "a list"),
    "dict": (dict, "a section"),
    "any": (object, "a finite value"),
}


def ds_config_names() -> list[str]:
    """The shipped DeepSpeed JSONs."""
    return sorted(path.stem for path in ds_configs_dir().glob("*.json"))


@dataclass
class ReadJson:
    """A DeepSpeed JSON as it was read.

    "auto" stands only where the recipe owns the value.
    """

    config: Tree = field(default_factory=dict)  # in current keys, without what is refused or idle
    problems: list[UserError] = field(default_factory=list)  # one for each thing that is wrong
    notes: list[str] = field(default_factory=list)  # what is read as something else, or has no effect


def load_deepspeed(name_or_path: str, overrides: Tree | None = None) -> Tree:
    """A DeepSpeed JSON with ``overrides`` inside, not yet resolved: "auto" may stand where the recipe owns the value.

    Overrides are a tree that is merged in; null removes a key.

    Raises:
        UserError: no such file, broken JSON, unknown keys, wrong types, or keys that are refused: all of them.
    """
    read = read_deepspeed(name_or_path, overrides)
    if read.problems:
        raise as_one(read.problems, f"DeepSpeed JSON {name_or_path}")
    return read.config


def read_deepspeed(name_or_path: str, overrides: Tree | None = None, *, world_size: int = 1) -> ReadJson:
    """Like ``load_deepspeed``, but what is wrong with keys and types is returned, not raised.

    Some keys are refused where ``world_size`` is more than one rank.

    Raises:
        UserError: no such file, or broken JSON.
    """
    base, place = _read(name_or_path)
    over = overrides or {}
    overridden = {path for path, _ in leaves(over)}

    def place_of(path: tuple[str, ...]) -> str:
        from_recipe = any(path[: len(key)] == key or key[: len(path)] == path for key in overridden)
        return "ds." if from_recipe else f"{place}: "

    read = ReadJson()
    config = translated(without_nulls(merge(base, over)), place_of, read.problems, read.notes)
    check = _Check(config, place_of, read.problems)
    config = check.section(config, KNOWN, ())
    check.report_autos()
    read.config = without_refused_and_idle(config, world_size, place_of, read.problems, read.notes)
    return read


def json_place(name_or_path: str) -> str:
    """How messages name the JSON."""
    return shown(_find(name_or_path))


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(".json") or "/" in name_or_path:
        return Path(name_or_path)
    path = ds_configs_dir() / f"{name_or_path}.json"
    if not path.is_file():
        otherwise = (
            f"choose one of {', '.join(ds_config_names())}, or give the path of your own, e.g. --ds my/zero.json"
        )
        raise UserError(
            f"DeepSpeed JSON {name_or_path!r} does not exist", did_you_mean(name_or_path, ds_config_names(), otherwise)
        )
    return path


def _read(name_or_path: str) -> tuple[Tree, str]:
    path = _find(name_or_path)
    place = shown(path)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> Tree:
        tree: Tree = {}
        for key, value in pairs:
            if key in tree:
                raise UserError(f"{place}: the key {key} stands twice in one section", "keep one of the two")
            tree[key] = value
        return tree

    text = read_text(path, "a DeepSpeed JSON")
    try:
        config = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise _not_json(text, error, place) from error
    if not isinstance(config, dict):
        raise UserError(f"{place}: not one object {{…}}", "put all keys of the DeepSpeed JSON between braces")
    return config, place


def _not_json(text: str, error: json.JSONDecodeError, place: str) -> UserError:
    """The two most frequent faults of a JSON have words of their own."""
    where = f"{place} line {error.lineno}, column {error.colno}: not JSON"
    rest = text[error.pos :].lstrip()
    if rest.startswith(("//", "/*", "#")):
        return UserError(f"{where}: it has no comments", 'take the comment out, or make it a key: "_comment": "…"')
    if rest.startswith(("}", "]")) and text[: error.pos].rstrip().endswith(","):
        return UserError(f"{where}: a comma stands before the closing bracket", "take the comma out")
    return UserError(f"{where}: {error.msg}", "correct it there; ds_configs/zero2.json is an example")


class _Check:
    """Keys and types of a DeepSpeed JSON; what is wrong is added to ``problems``."""

    def __init__(self, config: Tree, place_of: PlaceOf, problems: list[UserError]) -> None:
        self.config = config  # the whole JSON
        self.place_of = place_of
        self.problems = problems
        self.autos: dict[str, list[str]] = {}  # place -> keys

    def section(self, tree: Tree, known: Tree, path: tuple[str, ...]) -> Tree:
        """``tree`` with whole numbers as integers, and without "auto" where DeepSpeed would drop it."""
        result: Tree = {}
        for key, value in tree.items():
            here = (*path, key)
            dotted = ".".join(here)
            where = f"{self.place_of(here)}{dotted}"
            result[key] = value
            if key not in known:
                if dotted not in REFUSED:
                    hint = _suggestion(key, known, path, self.config)
                    self.problems.append(UserError(f"{where} is not a DeepSpeed key", hint))
            elif dotted == "optimizer.params" and isinstance(value, dict):
                owned = {name.rsplit(".", 1)[-1]: "any" for name in OWNED if name.startswith("optimizer.params.")}
                result[key] = self.section(value, {**OPTIMIZER_IMPLEMENTATION, **owned}, here)
            elif value == "auto":
                if dotted not in AUTO_ALLOWED and dotted not in OWNED:
                    self.autos.setdefault(self.place_of(here), []).append(dotted)
                    del result[key]
            elif isinstance(known[key], dict):
                if isinstance(value, dict):
                    result[key] = self.section(value, known[key], here)
                else:
                    self.problems.append(UserError(f"{where}={value!r} is not a section", f"write {dotted} as {{…}}"))
            else:
                result[key] = _typed(value, known[key], where, self.problems)
        return result

    def report_autos(self) -> None:
        """One problem for all "auto" of a place."""
        for place, keys in self.autos.items():
            listed = f", {place if place == 'ds.' else ''}".join(keys)
            self.problems.append(
                UserError(
                    f'{place}{listed} {"is" if len(keys) == 1 else "are"} "auto", which DeepSpeed drops',
                    f"write the {'value' if len(keys) == 1 else 'values'}, or ds.KEY=null for DeepSpeed's default "
                    f'("auto" is for what the recipe owns: {", ".join(OWNED)})',
                )
            )


def _suggestion(key: str, known: Tree, path: tuple[str, ...], config: Tree) -> str:
    """Where a key that is not known here belongs: its name of today, the same word in another section of ``config``
    that does not give it yet, else the nearest word here.
    """
    dotted = ".".join((*path, key))
    homes = [RENAMED[dotted]] if dotted in RENAMED else [".".join(home) for home in _places_of(key, KNOWN)]
    homes = [home for home in homes if home != dotted]
    if 0 < len(homes) <= 3:
        free = [home for home in homes if value_at(config, home) is None]
        verb = "rename it to" if dotted in RENAMED else "move it to"
        return f"{verb} {' or '.join(free)}" if free else f"take it out: {' and '.join(homes)} is given already"
    return did_you_mean(key, known, "take it out", prefix="".join(f"{step}." for step in path))


def _places_of(key: str, known: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, kind in known.items():
        if name == key:
            yield (*path, name)
        if isinstance(kind, dict) and name != "bfloat16":  # another name of bf16
            yield from _places_of(key, kind, (*path, name))


def _typed(value: Any, kind: Any, where: str, problems: list[UserError]) -> Any:
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e8 is how people write a bucket size
    wanted = f"one of {', '.join(map(str, kind))}" if isinstance(kind, tuple) else _TYPES[kind][1]
    if not _is_finite(value):
        word = "NaN" if "nan" in str(value) else "Infinity"
        problems.append(UserError(f"{where}={word} is not JSON", f"write {wanted}, or take the key out"))
    elif not _fits(value, kind):
        problems.append(UserError(f"{where}={value!r} is not {wanted}", _unquoted(value, kind) or f"write {wanted}"))
    return value


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return not isinstance(value, bool) and value in kind
    truth_as_number = isinstance(value, bool) and kind in ("int", "float")
    return not truth_as_number and isinstance(value, _TYPES[kind][0])


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _unquoted(value: Any, kind: Any) -> str:
    """The hint for numbers and truth values in quotes; empty where the value is none."""
    if not isinstance(value, str):
        return ""
    try:
        meant = json.loads(value.lower())
    except ValueError:
        return ""
    if kind == "int" and isinstance(meant, float) and meant.is_integer():
        meant = int(meant)
    return f"write {json.dumps(meant)} without quotes" if _fits(meant, kind) else ""
