"""YAML as people mean it: YAML 1.2 scalars, no duplicate keys, and the line on which each key stands.

PyYAML speaks YAML 1.1, in which ``1e-4`` is a word, ``off`` is false and ``12:30`` is a number of seconds; in a recipe
they are a learning rate, a mode and a text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from toolkit.errors import UserError

Lines = dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}  # its own table: the parent's stays as it is


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes a text which YAML 1.2 would take for a number."""


for _tag, _pattern, _first in (
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
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, place: str) -> tuple[Any, Lines]:
    """The value of a YAML text and the line of each of its keys.

    Args:
        text: one YAML document.
        place: how an error message names the text, such as a file name.

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
        _note_lines(node, (), lines, place)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{place}{where}: not YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply, or an alias refers to what encloses it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{place}: not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node, path: tuple[str, ...], lines: Lines, place: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        here = (*path, str(key_node.value))
        line = key_node.start_mark.line + 1
        if here in lines:
            raise UserError(f"{place} line {line}: {'.'.join(here)} stands on line {lines[here]} too: keep one of them")
        lines[here] = line
        _note_lines(value_node, here, lines, place)


def parse_value(text: str) -> Any:
    """The value of an override such as ``1e-4``, ``off``, ``[0.9, 0.98]`` or ``{kind: conv}``.

    A text that opens no bracket or quote is one scalar, whatever colons and hashes it holds, so that
    ``model.prefix=translate to English:`` needs no quotes beyond the shell's.

    Raises:
        UserError: a bracket or quote is not closed.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text, text)[0]
    loader = _Loader("")
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """``value`` as YAML that ``parse_yaml`` reads back unchanged, keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
