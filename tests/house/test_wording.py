"""Tests assert what an error is about, and never how it is worded: messages.txt alone holds the wording.

What an error is about are keys, values, files, rows, numbers and names, and words for its kind. Two plain words or more
in a row are wording. Tests of whole commands are left out: they assert what a terminal shows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOMS = sorted({path.parent for path in TESTS.rglob("test_*.py")})
LEFT_OUT = ("end_to_end", "as_users_do", "gpu", "house")
OF_AN_ERROR = re.compile(r"\.hint\b|\.message\b|\bstr\((error|\w+\.value)\)")
FACT = " 0 "


def asserted(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each string that a test compares with an error, as far as it is written down in its file."""
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        known = {**written(tree), **written(function)}
        for node in ast.walk(function):
            for expression in compared(node):
                yield from ((node.lineno, text) for text in texts(expression, known))  # type: ignore[attr-defined]


def compared(node: ast.AST) -> list[ast.expr]:
    """What a node compares with an error: `match=`, `in`, `==`, `re.search`, `endswith`."""
    if isinstance(node, ast.Compare) and OF_AN_ERROR.search(ast.unparse(node.comparators[0])):
        return [node.left]
    if isinstance(node, ast.Compare) and OF_AN_ERROR.search(ast.unparse(node.left)):
        return node.comparators
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return []
    if node.func.attr in ("search", "match", "fullmatch") and OF_AN_ERROR.search(ast.unparse(node.args[-1])):
        return node.args[:1]
    if node.func.attr in ("startswith", "endswith") and OF_AN_ERROR.search(ast.unparse(node.func.value)):
        return node.args
    return [keyword.value for keyword in node.keywords if keyword.arg == "match"]


def written(scope: ast.Module | ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """The values that names have in a scope: by assignment, by `for` over what is written there, by `parametrize`."""
    found: dict[str, list[ast.expr]] = {}
    for node in scope.body if isinstance(scope, ast.Module) else ast.walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            names = [name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)]
            spread(names, node.iter, found)
    for decorator in scope.decorator_list if isinstance(scope, ast.FunctionDef) else []:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            named = ast.literal_eval(decorator.args[0])
            spread(re.findall(r"\w+", named) if isinstance(named, str) else list(named), decorator.args[1], found)
    return found


def spread(names: list[str], values: ast.expr, found: dict[str, list[ast.expr]]) -> None:
    """Give each name its column of a literal of rows."""
    if isinstance(values, ast.Dict):
        rows: list[ast.expr] = [
            ast.Tuple([key, value]) for key, value in zip(values.keys, values.values, strict=True) if key
        ]
    else:
        rows = list(getattr(values, "elts", []))
    for row in rows:
        if isinstance(row, ast.Call) and ast.unparse(row.func).endswith("param"):
            row = ast.Tuple(row.args) if len(names) > 1 else row.args[0]
        cells = row.elts if len(names) > 1 and isinstance(row, ast.Tuple | ast.List) else [row]
        for name, cell in zip(names, cells, strict=False):
            found.setdefault(name, []).append(cell)


def texts(node: ast.expr, known: dict[str, list[ast.expr]]) -> list[str]:
    """The strings that an expression can be; what is not written down stands as a fact."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else FACT for part in node.values]
        return ["".join(map(str, parts))]
    if isinstance(node, ast.Name):
        others = {name: values for name, values in known.items() if name != node.id}
        return [text for value in known.get(node.id, []) for text in texts(value, others)]
    if isinstance(node, ast.Call | ast.BinOp | ast.Tuple | ast.List | ast.IfExp | ast.Starred | ast.Subscript):
        return [text for child in ast.iter_child_nodes(node) for text in texts(child, known)]  # type: ignore[arg-type]
    return []


def prose(text: str) -> list[str]:
    """The longest run of plain words in a pattern; a word beside a number says what it counts."""
    text = re.sub(r"'[^']*'|`[^`]*`|\"[^\"]*\"", FACT, text)  # names in quotes
    text = re.sub(
        r"\\[a-zA-Z]|\[[^\]]*\][*+?]?|\.[*+]\??|(?<!\\)[()^$?+*]", " … ", text
    )  # what the pattern leaves open
    tokens = re.findall(r"[:;]|[^\s:;]+", re.sub(r"(\w+, )+\w+", FACT, text.replace("\\", "")))  # lists of names
    runs: list[list[str]] = [[]]
    for place, token in enumerate(tokens):
        counts = any(re.search(r"\d", near) for near in tokens[max(0, place - 1) : place + 2])
        if re.fullmatch(r"[a-z]{2,}", token) and not counts:
            runs[-1].append(token)
        else:
            runs.append([])
    return max(runs, key=len)


def wording(path: Path) -> list[str]:
    """The places of a test file that assert how an error is worded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        f"{path.relative_to(TESTS.parent)}:{line}: {text!r}"
        for line, text in asserted(tree)
        if any(len(prose(alternative)) > 1 for alternative in text.split("|"))
    ]


@pytest.mark.parametrize("room", [room for room in ROOMS if room.name not in LEFT_OUT], ids=lambda room: room.name)
def test_tests_assert_no_wording(room: Path) -> None:
    found = [place for path in sorted(room.glob("*.py")) for place in wording(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"line 3 .*data\.columns .*'some thing'", []),
        (r"\b14\b.*\b24 clips", []),
        ("the file is truncated", ["the", "file", "is", "truncated"]),
        ("truncated", ["truncated"]),
    ],
)
def test_plain_words_are_prose(text: str, words: list[str]) -> None:
    assert prose(text) == words
