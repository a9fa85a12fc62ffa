"""The fast tier leaves out tests that start processes, wherever the clone lies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest


class Item:
    """A collected test as far as the order looks at it."""

    def __init__(self, root: Path, path: str, *marks: str) -> None:
        self.path = root / path
        self.config = SimpleNamespace(rootpath=root)
        self.marks = marks

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def fast_of(*items: Any) -> tuple[list[Any], list[Any]]:
    """What a fast tier of these tests runs and leaves out."""
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(getoption=lambda name: name == "--fast", hook=hook)
    kept = list(items)
    conftest.pytest_collection_modifyitems(config, kept)
    return kept, left_out


@pytest.mark.parametrize("clone", ["/home/me/toolkit", "/srv/house/toolkit", "/launch", "/gpu/end_to_end/clone"])
def test_the_fast_tier_is_the_same_wherever_the_clone_lies(clone: str) -> None:
    root = Path(clone)
    slow = [Item(root, f"tests/{folder}/test_a.py") for folder in ("end_to_end", "house", "launch")]
    marked = Item(root, "tests/corpus/test_b.py", "process")
    fast = [Item(root, "tests/corpus/test_a.py"), Item(root, "tests/test_errors.py")]
    kept, left_out = fast_of(slow[0], fast[0], slow[1], marked, slow[2], fast[1])
    assert kept == fast
    assert left_out == [marked, slow[1], slow[2], slow[0]]


def test_no_test_of_the_fast_tier_starts_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/test_a.py::test_a (call)")
    for event, arguments in (("subprocess.Popen", ("python", ["python"])), ("os.fork", ()), ("os.system", ("ls",))):
        with pytest.raises(RuntimeError, match=event):
            conftest._refuse_processes(event, arguments)
    conftest._refuse_processes("subprocess.Popen", ("git", ["git", "rev-parse"]))
    conftest._refuse_processes("open", ("file", "r", 0))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    conftest._refuse_processes("os.fork", ())
