#!/usr/bin/env python
"""Draw the rooms of the toolkit into docs/internals.md: who imports whom, and what each room's ``__init__`` says.

python docs/rooms.py
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "internals.md"
BEGIN, END = "<!-- rooms: written by python docs/rooms.py -->\n", "<!-- end of rooms -->\n"


@cache
def rooms() -> dict[str, list[Path]]:
    """The files of each room: a folder of ``toolkit``, or a file beside them; ``toolkit/__init__.py`` is none."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        name = path.relative_to(ROOT / "toolkit").parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


@cache
def imports() -> dict[str, set[str]]:
    """The other rooms that each room imports."""
    found: dict[str, set[str]] = {room: set() for room in rooms()}
    for room, paths in rooms().items():
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found[room] |= {name.split(".")[1] for name in names if name.startswith("toolkit.")} - {room}
    return found


@cache
def height(room: str) -> int:
    """Longest way down from a room, along its imports."""
    return 1 + max((height(other) for other in imports()[room]), default=0)


def direct(room: str) -> list[str]:
    """The imported rooms that no other imported room imports."""
    below = {lower for other in imports()[room] for lower in _reached(other)}
    return sorted(imports()[room] - below)


@cache
def _reached(room: str) -> frozenset[str]:
    return frozenset(imports()[room]).union(*(_reached(other) for other in imports()[room]))


def purpose(folder: Path) -> str:
    """The first two sentences of a room's docstring."""
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return " ".join(re.split(r"(?<=\.) ", text)[:2]).replace("``", "`")


def drawing() -> str:
    """A graph of the rooms, from high to low, and a table of what they are."""
    ordered = sorted(rooms(), key=lambda room: (-height(room), room))
    lines = ["```mermaid", "graph TD"]
    lines += [f"    {room} --> {other}" for room in ordered for other in direct(room)]
    lines += ["```", "", "| room | what it is | it imports |", "| --- | --- | --- |"]
    for room in ordered:
        folder = ROOT / "toolkit" / room
        used = ", ".join(sorted(imports()[room]))
        lines.append(f"| `{room}` | {purpose(folder)} | {used} |")
        inner = [path for path in sorted(folder.glob("*")) if (path / "__init__.py").is_file()]
        lines += [f"| `{room}/{path.name}` | {purpose(path)} | |" for path in inner]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the drawing as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + BEGIN + drawing() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(rooms())} rooms in {PAGE.relative_to(ROOT)}")
