"""benchmarks/limited_runs.py: its limits hold, and a run that meets one counts as out of memory."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from toolkit.errors import EXIT_OUT_OF_MEMORY, EXIT_SMALLER_NEXT, EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("limited_runs")


@pytest.mark.process
@pytest.mark.parametrize("by", ["addresses", "cgroup"])
@pytest.mark.parametrize(("size", "end"), [(16, "trained"), (2048, "out of memory")])
def test_a_process_that_takes_more_than_its_limit_is_out_of_memory(
    runs: ModuleType, tmp_path: Path, by: str, size: int, end: str
) -> None:
    if by == "cgroup" and not runs.has_cgroups():
        pytest.skip("needs the right to make memory cgroups, of version 1")
    draw = runs.Draw(runs.Cell("demo", "zero1", 1, recomputed=False), 1, (), by, 0.0)
    command = [sys.executable, "-c", f"import time; held = b'1' * {size * MIB}; time.sleep(0.5)"]
    row = runs.run_limited(command, draw, 512 * MIB, tmp_path / "run")
    assert row["end"] == end
    if end == "trained":
        assert 0.01 < row["peak_gib_a_rank"] <= 0.5


@pytest.mark.parametrize(
    ("codes", "output", "end"),
    [
        ([0, 0], "", "trained"),
        ([EXIT_USER_ERROR] * 2, "error: training.micro_batch_size=auto: not one of the longest clips", "refused"),
        ([EXIT_OUT_OF_MEMORY], "", "out of memory"),
        ([EXIT_SMALLER_NEXT, -15], "", "out of memory"),
        ([-9, 1], "", "out of memory"),
        ([1], "RuntimeError: can't allocate memory", "out of memory"),
        ([1], "RuntimeError: can't start new thread", "out of memory"),
        ([1], "KeyError: 7", "other"),
        ([EXIT_USER_ERROR], "error: no such recipe", "other"),
    ],
)
def test_how_a_run_ended(runs: ModuleType, codes: list[int], output: str, end: str) -> None:
    assert runs.end_of(codes, output).startswith(end)
