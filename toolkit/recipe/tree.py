"""Nested dictionaries with dotted keys: merge, walk, look up, and the nearest valid spelling of a wrong key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

Tree = dict[str, Any]


def merge(base: Tree, over: Tree) -> Tree:
    """``base`` with ``over`` on top: mappings are merged key by key, everything else is replaced. Changes neither."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def nested(path: tuple[str, ...], value: Any) -> Tree:
    """The tree that holds ``value`` at ``path`` and nothing else."""
    for key in reversed(path):
        value = {key: value}
    return value


def leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every path and value that is not itself a non-empty mapping, in order."""
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict) and value:
            yield from leaves(value, here)
        else:
            yield here, value


def value_at(tree: Tree, dotted: str) -> Any:
    """The value at a dotted key, or None where there is none."""
    value: Any = tree
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def without(tree: Tree, dotted: str) -> Tree:
    """A copy of ``tree`` without the value at a dotted key; of its sections those that are left empty go, too."""
    key, _, below = dotted.partition(".")
    rest = {name: value for name, value in tree.items() if name != key}
    section = tree.get(key)
    if below and isinstance(section, dict) and (kept := without(section, below)):
        rest[key] = kept
    return rest


def without_nulls(tree: Tree) -> Tree:
    """A copy of ``tree`` without the keys whose value is null, at any depth."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def nearest(word: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid spelling nearest to ``word``, or None where none is near: below ``cutoff`` of 0 to 1."""
    matches = difflib.get_close_matches(word, list(valid), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: str, valid: Iterable[str], otherwise: str, *, prefix: str = "", cutoff: float = 0.6) -> str:
    """A hint for a word that is none of ``valid``: the nearest of them, if any is near, and what to do otherwise."""
    match = nearest(word, valid, cutoff)
    return f"did you mean {prefix}{match}? otherwise, {otherwise}" if match else otherwise
