"""The words beside the poses: ``model.prefix`` and ``model.prompt``, where ``{language}`` is the clip's own."""

from __future__ import annotations

import string
from collections.abc import Mapping

CONDITIONS = ("language", "target_language", "prompt", "context")
"""Columns of a table that a prefix can name."""
POSES = "{poses}"
"""Where the poses stand in a prompt."""


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


def around_poses(prompt: str) -> tuple[str, str]:
    """The words of a prompt before and behind its poses; conditions stand before them, where clips may differ.

    Raises:
        ValueError: it has no poses, several, or conditions behind them; with a hint as its second argument.
    """
    before, poses, behind = prompt.partition(POSES)
    if not poses or POSES in behind:
        many = "names {poses} twice" if poses else "does not name {poses}"
        raise ValueError(f"prompt {prompt!r} {many}", "name {poses} once, as in 'Translate {poses} into English:'")
    placeholders(before)
    if named := placeholders(behind):
        raise ValueError(f"prompt {prompt!r} names {{{named[0]}}} behind {{poses}}", "name conditions before {poses}")
    return before, behind.replace("{{", "{").replace("}}", "}")


def own_words(prefix: str | None, prompt: str | None) -> str:
    """The words before the poses, in which conditions of a clip may stand: a prefix, or the beginning of a prompt.

    Raises:
        ValueError: there are both, or as :func:`around_poses`; with a hint as its second argument.
    """
    if prompt and prefix:
        raise ValueError(f"prompt={prompt!r} stands beside prefix={prefix!r}", "set one of them")
    return around_poses(prompt)[0].strip() if prompt else prefix or ""


def fill(prefix: str, conditions: Mapping[str, str]) -> str:
    """The prefix of a clip; a condition that is not known is left out, and several spaces become one.

    >>> fill("translate {language} to {target_language}: {context}", {"language": "ins", "target_language": "Hindi"})
    'translate ins to Hindi:'
    """
    values = {name: conditions.get(name, "") for name in CONDITIONS}
    return " ".join(prefix.format_map(values).split())
