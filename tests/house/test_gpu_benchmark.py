"""benchmarks/gpu.py takes the most important rows first, writes each as it comes, and continues where it stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.house.gpu_benchmark import H100, Machine
from tests.scripts import load_script

H200_GIB = 139.8
START = 15  # seconds of imports and of the corpus, before the first row


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_script("benchmarks/gpu.py")


@pytest.fixture
def machine(gpu: ModuleType, tmp_path: Path) -> Machine:
    return Machine(gpu, tmp_path / "results" / "gpu.json")


def test_each_row_is_written_as_it_comes_with_its_device(machine: Machine) -> None:
    assert machine.take(minutes=10) == []
    assert machine.written == [[], ["a"], ["a", "b"]]
    assert machine.results()["b"] == {"clips_per_second": 90, "took_seconds": 90} | H100


def test_the_time_is_kept_and_a_later_call_continues(machine: Machine) -> None:
    assert machine.take(minutes=2) == ["b"], "c still fits"
    assert list(machine.results()) == ["a", "c"] and machine.now <= 100 + 120
    assert machine.limits == [120, 60], "what is left"
    assert machine.take(minutes=2) == []
    assert list(machine.results()) == ["a", "c", "b"]
    began = len(machine.written)
    assert machine.take(minutes=2) == [] and len(machine.written) == began, "everything is there"


def test_a_row_that_failed_is_taken_again_and_stops_no_other(machine: Machine) -> None:
    machine.broken = {"a"}
    machine.take(minutes=10)
    assert "out of memory" in machine.results()["a"]["error"] and "c" in machine.results()
    machine.broken = set()
    machine.take(minutes=10)
    assert machine.results()["a"]["clips_per_second"] == 60
    assert len(machine.written) == 4


def test_rows_of_which_a_side_failed_come_last_and_never_with_fewer_sides(machine: Machine) -> None:
    good, bad = {"clips_per_second": 9.0}, {"error": "out of memory"}
    machine.found = {"sides": {"ours": good, "plain": bad}}
    machine.take(minutes=2)
    machine.found = {"sides": {"ours": good, "plain": good}}
    machine.take(minutes=1.5)
    assert list(machine.results()) == ["a", "c", "b"], "the one that was left comes first"
    machine.found = {"sides": {"ours": bad, "plain": bad}}
    machine.take(minutes=10)
    assert machine.results()["a"]["sides"] == {"ours": good, "plain": bad}, "what was measured stays"
    machine.found = {"sides": {"ours": good, "plain": good}}
    machine.take(minutes=10)
    assert machine.results()["a"]["sides"] == {"ours": good, "plain": good}
    began = len(machine.written)
    machine.take(minutes=10)
    assert len(machine.written) == began, "everything is there"


def test_a_row_that_was_ended_is_taken_again_and_loses_nothing(machine: Machine) -> None:
    speeds = {"ours": {"clips_per_second": 9.0, "mfu": 0.4}, "bare": {"clips_per_second": 8.0}}
    failed = {side: {"error": "no time was left"} for side in speeds}
    turns = {side: figures | failed[side] for side, figures in speeds.items()}  # ended while they were profiled
    machine.found = {"sides": turns, "ended_after_seconds": 60}
    machine.take(minutes=1)
    machine.found = {"sides": failed, "ended_after_seconds": 9}  # while they started
    machine.take(minutes=1)
    assert machine.results()["a"]["sides"] == turns
    machine.found = {"sides": {side: figures | {"busy": 0.5} for side, figures in speeds.items()}}
    machine.take(minutes=1)
    assert "ended_after_seconds" not in machine.results()["a"] and machine.results()["a"]["sides"]["ours"]["busy"]


def test_a_row_that_was_whole_stays_where_it_is_measured_again_and_ended(machine: Machine) -> None:
    machine.take(minutes=10)
    machine.found = {"ended_after_seconds": 3}
    machine.take(minutes=10, again=True)
    machine.broken = {"a", "b", "c"}
    machine.take(minutes=10, again=True)
    assert [row.get("clips_per_second") for row in machine.results().values()] == [60, 90, 30]


def test_a_signal_ends_a_row_which_is_written_and_no_other_is_begun(machine: Machine) -> None:
    machine.found = {"sides": {"ours": {"clips_per_second": 9.0}}, "ended_after_seconds": 3}
    machine.stopped_in = "b"
    assert machine.take(minutes=10) == ["c"]
    assert list(machine.results()) == ["a", "b"] and machine.results()["b"]["sides"]["ours"]


def test_another_device_has_rows_of_its_own(machine: Machine) -> None:
    machine.take(minutes=10)
    machine.take(minutes=1, device=H100 | {"device": "H200"})
    assert [row["device"] for row in machine.results().values()] == ["H200", "H100", "H100"]
    assert machine.take(minutes=1, again=True) == ["b", "c"], "rows that are named are taken again"


class Course:
    """A call in which every row takes as long as it says, from its start to its last row; no process is started."""

    def __init__(self, gpu: ModuleType, path: Path) -> None:
        self.gpu, self.path, self.now = gpu, path, float(START)
        self.measuring = gpu.Measuring(gpu.ROWS, path.parent, False, H200_GIB)

    def seconds(self, row: Any) -> float:
        return float(self.measuring.seconds(row))

    def __call__(self, row: Any, seconds: float) -> dict[str, Any]:
        opening = [
            each for each in self.measuring._opening(row, seconds) if isinstance(each.measure, self.gpu.Training)
        ]
        self.now += self.seconds(row)
        self.measuring.opened |= {each.name: SimpleNamespace(commands=each.measure.sides) for each in opening}
        self.measuring.opened.pop(row.name, None)
        return {"clips_per_second": 1.0}

    def measured_in(self, minutes: float) -> list[str]:
        self.gpu.take(self.gpu.ROWS, self.path, H100, 60 * minutes, self, clock=lambda: self.now)
        return list(json.loads(self.path.read_text()))


def test_the_most_important_rows_fit_into_eight_minutes_and_all_into_what_is_said(
    gpu: ModuleType, tmp_path: Path
) -> None:
    names = [row.name for row in gpu.ROWS]
    assert len(set(names)) == len(names)
    assert Course(gpu, tmp_path / "some.json").measured_in(8)[:5] == names[:5]
    (minutes,) = re.findall(r"--minutes (\d+) +all rows", gpu.__doc__)
    assert set(Course(gpu, tmp_path / "all.json").measured_in(float(minutes))) == set(names)
    assert max(row.seconds for row in gpu.ROWS) <= 8 * 60, "a row that is longer would always be left for the next call"
    training = [row.measure for row in gpu.ROWS if isinstance(row.measure, gpu.Training)]
    assert max(row.gib for row in training) <= gpu.SHARE * H200_GIB, "an H200 holds the sides of each row"
    assert sum(row.gib for row in training[:2]) <= gpu.SHARE * H200_GIB, "and those of the first two"
