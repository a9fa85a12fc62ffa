"""The words before the poses: ``model.prefix``, in which ``{language}`` and others stand for conditions of a clip."""

from __future__ import annotations

import string
from collections.abc import Mapping

CONDITIONS = ("language", "target_language", "prompt", "context")
"""Columns of a table that a prefix can name."""


def placeholders(prefix: str | None) -> list[str]:
    """The conditions that a prefix names, each once; a prefix without any is the same for all clips.

    Raises:
        ValueError: it names something else, or its braces do not close; with a hint as its second argument.
    """
    try:
        fields = list(string.Formatter().parse(prefix or ""))
    except ValueError as error:
        raise ValueError(f"prefix {prefix!r}: {error}", "write a brace that is part of the text twice: {{") from error
    names = dict.fromkeys(name for _, name, _, _ in fields if name is not None)
    for _, name, form, conversion in fields:
        if name is not None and (name not in CONDITIONS or form or conversion):
            known = ", ".join(f"{{{condition}}}" for condition in CONDITIONS)
            raise ValueError(f"prefix {prefix!r} names {{{name}}}, which is no condition of a clip", f"use {known}")
    return list(names)


def fill(prefix: str, conditions: Mapping[str, str]) -> str:
    """The prefix of a clip; a condition that is not known is left out, and several spaces become one.

    >>> fill("translate {language} to {target_language}: {context}", {"language": "ins", "target_language": "Hindi"})
    'translate ins to Hindi:'
    """
    values = {name: conditions.get(name, "") for name in CONDITIONS}
    return " ".join(prefix.format_map(values).split())
