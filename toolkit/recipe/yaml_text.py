"""YAML 1.2 scalars, no duplicate keys, and the line on which each key stands.

PyYAML implements YAML 1.1, in which ``1e-4`` is a text, ``off`` is false and ``12:30`` is a number of seconds; in a
recipe they are a learning rate, a mode and a text. Its nodes know their lines, so no other reader is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from toolkit.errors import UserError

Path = tuple[str, ...]
Lines = dict[Path, int]
TakesText = Callable[[Path], bool]

_TAG = "tag:yaml.org,2002:"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}  # its own table: the parent's stays as it is


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes a text which YAML 1.2 would take for a number."""


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, place: str, takes_text: TakesText = lambda path: False) -> tuple[Any, Lines]:
    """The value of a YAML text and the line of each of its keys.

    Args:
        text: one YAML document.
        place: how an error message names the text, such as a file name.
        takes_text: whether the value at a path is a text; a number there stays as it is written (``1e5``, ``1.10``).

    Returns:
        The value, and a table from each key's path to its line, counted from 1.

    Raises:
        UserError: the text is not YAML, or a key stands twice in one mapping.
    """
    loader = _Loader(text)
    lines: Lines = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _visit(node, (), lines, place, takes_text)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _not_yaml(f"{place}{where}", error.problem or error.context or "") from error
    except RecursionError as error:
        raise UserError(
            f"{place}: nested too deeply, or an alias refers to what encloses it",
            "write the value out where the alias stands",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise _not_yaml(place, " ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _not_yaml(where: str, problem: str) -> UserError:
    hint = "write `key: value`, indent with spaces, close every bracket, and quote texts that hold special characters"
    return UserError(f"{where}: not YAML: {problem}", hint)


def _visit(node: yaml.Node, path: Path, lines: Lines, place: str, takes_text: TakesText) -> None:
    """Note the line of each key below ``node``, and turn numbers into texts where the key takes a text."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if here in lines:
                raise UserError(
                    f"{place} line {line}: {'.'.join(here)} stands on line {lines[here]} too", "keep one of the two"
                )
            lines[here] = line
            _visit(value_node, here, lines, place, takes_text)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _visit(item, (*path, str(number)), lines, place, takes_text)
    elif node.tag in _NUMBERS and takes_text(path):
        node.tag = f"{_TAG}str"


def parse_value(text: str, takes_text: TakesText = lambda path: False) -> Any:
    """The value of an override such as ``1e-4``, ``off``, ``[0.9, 0.98]`` or ``{kind: conv}``.

    A text that opens no bracket or quote is one scalar, whatever colons and hashes it holds, so that
    ``model.prefix=translate to English:`` needs no quotes beyond the shell's.

    Raises:
        UserError: a bracket or quote is not closed.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text, text, takes_text)[0]
    loader = _Loader("")
    try:
        node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
        _visit(node, (), {}, text, takes_text)
        return loader.construct_object(node)
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """``value`` as YAML that ``parse_yaml`` reads back unchanged, keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
