"""The DeepSpeed JSONs: read strictly, with overrides put inside, and every unknown key named.

DeepSpeed ignores an unknown key at its top level and drops the word "auto" inside a section, so both are checked here.
Older spellings become today's (``ds_aliases.py``), and what does nothing or harms goes (``ds_refusals.py``), before
anyone looks at a value. What the values mean together is ``resolve.py``'s business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.files import read_text
from toolkit.recipe.deepspeed.aliases import translated
from toolkit.recipe.deepspeed.keys import AUTO_ALLOWED, KNOWN, OPTIMIZER_IMPLEMENTATION, OWNED
from toolkit.recipe.deepspeed.refusals import REFUSED, set_aside
from toolkit.recipe.paths import ds_configs_dir, shown
from toolkit.recipe.tree import Tree, did_you_mean, leaves, merge, nearest, without_nulls

PlaceOf = Callable[[tuple[str, ...]], str]  # how messages name the place of a key: its file, or "ds."

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
    "any": (object,),
}
_IN_WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a section",
    "any": "a finite value",
}


def ds_config_names() -> list[str]:
    """The shipped DeepSpeed JSONs."""
    return sorted(path.stem for path in ds_configs_dir().glob("*.json"))


@dataclass
class ReadJson:
    """A DeepSpeed JSON as it was read.

    Attributes:
        config: in today's words, without what is refused or idle; "auto" stands only where the recipe owns the value.
        problems: one sentence for each thing that is wrong.
        notes: what is read as something else, or has no effect.
    """

    config: Tree = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_deepspeed(name_or_path: str, overrides: Tree | None = None) -> Tree:
    """A DeepSpeed JSON with ``overrides`` inside, not yet resolved: "auto" may stand where the recipe owns the value.

    Args:
        name_or_path: a name in ``ds_configs/``, or the path of a JSON file.
        overrides: a tree laid on top; null removes a key.

    Raises:
        UserError: no such file, broken JSON, unknown keys, wrong types, or keys that are refused: all of them.
    """
    read = read_deepspeed(name_or_path, overrides)
    if read.problems:
        raise UserError("; ".join(read.problems))
    return read.config


def read_deepspeed(name_or_path: str, overrides: Tree | None = None, *, world_size: int = 1) -> ReadJson:
    """Like ``load_deepspeed``, but what is wrong with keys and types is handed back, not raised.

    Args:
        name_or_path, overrides: as there.
        world_size: number of ranks; some keys are refused on more than one.

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
    check = _Check(place_of, read.problems)
    config = check.section(config, KNOWN, ())
    check.tell_autos()
    read.config = set_aside(config, world_size, place_of, read.problems, read.notes)
    return read


def json_place(name_or_path: str) -> str:
    """How messages name the JSON."""
    return shown(_find(name_or_path))


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(".json") or "/" in name_or_path:
        return Path(name_or_path)
    path = ds_configs_dir() / f"{name_or_path}.json"
    if not path.is_file():
        match = nearest(name_or_path, ds_config_names())
        hint = f"did you mean {match}? " if match else ""
        raise UserError(
            f"DeepSpeed JSON {name_or_path!r} does not exist: {hint}there are {', '.join(ds_config_names())}; "
            "one of your own is given by its path, e.g. --ds my/zero.json"
        )
    return path


def _read(name_or_path: str) -> tuple[Tree, str]:
    path = _find(name_or_path)
    place = shown(path)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> Tree:
        tree: Tree = {}
        for key, value in pairs:
            if key in tree:
                raise UserError(f"{place}: the key {key} stands twice in one section: keep one of them")
            tree[key] = value
        return tree

    text = read_text(path, "a DeepSpeed JSON")
    try:
        config = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        where = f"{place} line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not JSON: {_what_json_lacks(text, error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{place}: a DeepSpeed JSON is one object {{…}}")
    return config, place


def _what_json_lacks(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON, in words for its two most frequent faults."""
    rest = text[error.pos :].lstrip()
    if rest.startswith(("//", "/*", "#")):
        return 'JSON has no comments: take it out, or make it a key: "_comment": "…"'
    if rest.startswith(("}", "]")) and text[: error.pos].rstrip().endswith(","):
        return "a comma stands before the closing bracket: take it out"
    return error.msg


class _Check:
    """Keys and types of a DeepSpeed JSON; what is wrong is added to ``problems``."""

    def __init__(self, place_of: PlaceOf, problems: list[str]) -> None:
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
                    self.problems.append(f"{where} is no DeepSpeed key{_suggestion(key, known, path)}")
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
                    self.problems.append(f"{where}={value!r} must be a section {{…}}")
            else:
                result[key] = _typed(value, known[key], where, self.problems)
        return result

    def tell_autos(self) -> None:
        """One problem for all "auto" of a place."""
        for place, keys in self.autos.items():
            listed = f", {place if place == 'ds.' else ''}".join(keys)
            self.problems.append(
                f'{place}{listed} {"is" if len(keys) == 1 else "are"} "auto", which DeepSpeed drops without a word: '
                f"write the {'value' if len(keys) == 1 else 'values'}, or ds.KEY=null for DeepSpeed's own "
                f'("auto" serves only where the recipe owns it: {", ".join(OWNED)})'
            )


def _suggestion(key: str, known: Tree, path: tuple[str, ...]) -> str:
    """Where a key that is not known here belongs: the same word in another section, else the nearest word here."""
    homes = [home for home in _places_of(key, KNOWN) if home != (*path, key)]
    if homes and len(homes) <= 3:
        return f"; it belongs at {' or '.join('.'.join(home) for home in homes)}"
    return did_you_mean(key, known, "".join(f"{step}." for step in path))


def _places_of(key: str, known: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, kind in known.items():
        if name == key:
            yield (*path, name)
        if isinstance(kind, dict) and name != "bfloat16":  # bf16 by another name
            yield from _places_of(key, kind, (*path, name))


def _typed(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e8 is how people write a bucket size
    wanted = f"one of {', '.join(map(str, kind))}" if isinstance(kind, tuple) else _IN_WORDS[kind]
    if _endless(value):
        word = "NaN" if "nan" in str(value) else "Infinity"
        problems.append(f"{where}: {word} is not JSON: write {wanted}, or take the key out")
    elif not _fits(value, kind):
        problems.append(f"{where}={value!r} must be {wanted}{_unquoted(value, kind)}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return not isinstance(value, bool) and value in kind
    truth_as_number = isinstance(value, bool) and kind in ("int", "float")
    return not truth_as_number and isinstance(value, _TYPES[kind])


def _endless(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_endless, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


def _unquoted(value: Any, kind: Any) -> str:
    """A hint for numbers and truth values in quotes."""
    if not isinstance(value, str):
        return ""
    try:
        meant = json.loads(value.lower())
    except ValueError:
        return ""
    if kind == "int" and isinstance(meant, float) and meant.is_integer():
        meant = int(meant)
    return f": write {json.dumps(meant)} without quotes" if _fits(meant, kind) else ""
