"""The DeepSpeed JSONs: read strictly, with overrides put inside, and every unknown key named.

DeepSpeed ignores an unknown key at its top level and drops the word "auto" inside a section, so both are checked here.
What the values mean together is ``resolve.py``'s business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.ds_keys import AUTO_ALLOWED, KNOWN, OPTIMIZER_IMPLEMENTATION, OWNED, REFUSED
from toolkit.recipe.files import read_text
from toolkit.recipe.paths import ds_configs_dir, shown
from toolkit.recipe.tree import Tree, did_you_mean, leaves, merge, nearest, without_nulls

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
    "any": "finite",
}


def ds_config_names() -> list[str]:
    """The shipped DeepSpeed JSONs."""
    return sorted(path.stem for path in ds_configs_dir().glob("*.json"))


def load_deepspeed(name_or_path: str, overrides: Tree | None = None) -> Tree:
    """A DeepSpeed JSON with ``overrides`` inside, not yet resolved: "auto" may stand where the recipe owns the value.

    Args:
        name_or_path: a name in ``ds_configs/``, or the path of a JSON file.
        overrides: a tree laid on top; null removes a key.

    Raises:
        UserError: no such file, broken JSON, or unknown keys and wrong types: all of them.
    """
    config, problems = read_deepspeed(name_or_path, overrides)
    if problems:
        raise UserError("; ".join(problems))
    return config


def read_deepspeed(name_or_path: str, overrides: Tree | None = None) -> tuple[Tree, list[str]]:
    """Like ``load_deepspeed``, but unknown keys and wrong types are handed back as a list of sentences."""
    base, place = _read(name_or_path)
    over = overrides or {}
    config = without_nulls(merge(base, over))
    overridden = {path for path, _ in leaves(over)}

    def place_of(path: tuple[str, ...]) -> str:
        from_recipe = any(path[: len(key)] == key or key[: len(path)] == path for key in overridden)
        return "ds." if from_recipe else f"{place}: "

    problems: list[str] = []
    return _checked(config, KNOWN, (), problems, place_of), problems


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

    def no_constant(word: str) -> Any:
        raise UserError(f"{place}: {word} is not JSON")

    try:
        config = json.loads(
            read_text(path, "a DeepSpeed JSON"), object_pairs_hook=no_duplicates, parse_constant=no_constant
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{place} line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise UserError(f"{place}: a DeepSpeed JSON is one object {{…}}")
    return config, place


def _checked(
    tree: Tree, known: Tree, path: tuple[str, ...], problems: list[str], place_of: Callable[[tuple[str, ...]], str]
) -> Tree:
    """``tree`` with whole numbers as integers; what is wrong is added to ``problems``."""
    result: Tree = {}
    for key, value in tree.items():
        here = (*path, key)
        dotted = ".".join(here)
        where = f"{place_of(here)}{dotted}"
        result[key] = value
        if dotted in REFUSED:
            problems.append(f"{where} has no place here: {REFUSED[dotted]}; take it out")
        elif key not in known:
            prefix = "".join(f"{step}." for step in path)
            problems.append(f"{where} is no DeepSpeed key{did_you_mean(key, known, prefix)}")
        elif dotted == "optimizer.params" and isinstance(value, dict):
            owned = {name.rsplit(".", 1)[-1]: "any" for name in OWNED if name.startswith("optimizer.params.")}
            result[key] = _checked(value, {**OPTIMIZER_IMPLEMENTATION, **owned}, here, problems, place_of)
        elif value == "auto":
            if dotted not in AUTO_ALLOWED and dotted not in OWNED:
                problems.append(
                    f'{where} is "auto", which DeepSpeed drops without a word: write the value '
                    f'("auto" serves only where the recipe owns it: {", ".join(OWNED)})'
                )
        elif isinstance(known[key], dict):
            if isinstance(value, dict):
                result[key] = _checked(value, known[key], here, problems, place_of)
            else:
                problems.append(f"{where}={value!r} must be a section {{…}}")
        else:
            result[key] = _typed(value, known[key], where, problems)
    return result


def _typed(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    if isinstance(kind, tuple):
        if isinstance(value, bool) or value not in kind:
            problems.append(f"{where}={value!r} must be one of {', '.join(map(str, kind))}")
        return value
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e8 is how people write a bucket size
    truth_as_number = isinstance(value, bool) and kind in ("int", "float")
    endless = isinstance(value, float) and not math.isfinite(value)
    if truth_as_number or endless or not isinstance(value, _TYPES[kind]):
        problems.append(f"{where}={value!r} must be {_IN_WORDS[kind]}")
    return value
