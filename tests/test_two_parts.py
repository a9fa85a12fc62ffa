"""`make test` runs both of its parts, fails if one fails, and sums both up in its last line."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT
from tests.two_parts import FOLDERS_OF_RANKS, add_up, run_both


def part(closing_line: str, code: int) -> list[str]:
    """A command that ends as pytest does."""
    return [sys.executable, "-c", f"print('.....\\n{closing_line}'); raise SystemExit({code})"]


@pytest.mark.process
@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1), ((2, 1), 2)])
def test_both_parts_run_and_one_that_fails_fails_all(
    capfd: pytest.CaptureFixture[str], codes: tuple[int, int], expected: int
) -> None:
    lines = [
        "== 1 failed, 2 passed, 3 deselected in 0.50s ==",
        "== 4 passed, 1 skipped, 1 warning in 61.25s (0:01:01) ==",
    ]
    code, closing_line = run_both([part(line, code) for line, code in zip(lines, codes, strict=True)])
    assert code == expected
    assert closing_line.strip("= ") == "1 failed, 6 passed, 1 skipped, 3 deselected, 1 warnings in 61.75s (0:01:01)"
    assert capfd.readouterr().out.splitlines() == [".....", lines[0], ".....", lines[1]]


@pytest.mark.process
def test_a_process_that_a_part_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    lines = [
        "import os, subprocess, sys",
        "left = subprocess.Popen(['sleep', '60'])",
        "open(sys.argv[1], 'w').write(str(left.pid))",
        "print('== 1 passed in 1.00s ==', flush=True)",
        "os._exit(0)",
    ]
    code, _ = run_both([[sys.executable, "-c", "\n".join(lines), str(tmp_path / "pid")]])
    assert code == 0
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it still runs


@pytest.mark.parametrize("line", ["", "Segmentation fault", "ERROR: file or directory not found: tests"])
def test_a_part_without_a_closing_line_is_an_error(line: str) -> None:
    assert add_up([line, "== 4 passed in 1.00s =="]).strip("= ") == "4 passed, 1 errors in 1.00s (0:00:01)"


def test_the_folders_of_ranks_are_there() -> None:
    assert all((ROOT / folder).is_dir() for folder in FOLDERS_OF_RANKS)
