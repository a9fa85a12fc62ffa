"""Every error that a user can correct, as the source has it: ``python tests/house/messages.py`` writes messages.txt."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("messages.txt")
KINDS = ("UserError", "NothingFits", "TooManyRejects", "Interrupted", "TrainingStopped", "PoseError")


@dataclass(frozen=True)
class Message:
    """One place that raises an error for the user.

    Attributes:
        kind: the class of the error.
        place: path of the file, from the root of the repository.
        line: of that file.
        message: expressions stand in braces.
        hint: the same; empty where there is none.
    """

    kind: str
    place: str
    line: int
    message: str
    hint: str


@cache
def messages() -> list[Message]:
    """All of them, by file and line."""
    return [
        found
        for folder in ("toolkit", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in _of(path)
    ]


def _of(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in sorted(calls, key=lambda node: node.lineno):
        if call.func.id in KINDS:  # type: ignore[attr-defined]
            hints = [keyword.value for keyword in call.keywords if keyword.arg == "hint"] or call.args[1:2]
            hint = _text(hints[0]) if hints else ""
            kind = call.func.id  # type: ignore[attr-defined]
            yield Message(kind, path.relative_to(ROOT).as_posix(), call.lineno, _text(call.args[0]), hint)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return f"{{{ast.unparse(node)}}}"


def listing() -> str:
    """The golden file's content."""
    lines: list[str] = []
    place = ""
    for found in messages():
        if found.place != place:
            lines += ["", found.place] if lines else [found.place]
            place = found.place
        lines += [f"  {found.message}", f"    hint: {found.hint}"] if found.hint else [f"  {found.message}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(listing(), encoding="utf-8")
    print(f"{len(messages())} messages in {GOLDEN.relative_to(ROOT)}")
