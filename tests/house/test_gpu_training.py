"""Ways of training that take turns in benchmarks/gpu.py: when they start and end, and what their figures are of."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.house.gpu_benchmark import Sides, measuring, two_rows
from tests.scripts import load_script


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_script("benchmarks/gpu.py")


@pytest.fixture
def sides(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Sides:
    return Sides(monkeypatch, sys.modules[gpu.Training.__module__])


@pytest.mark.parametrize(("gib", "seconds", "between"), [(60, 500, False), (40, 100, False), (40, 500, True)])
def test_a_row_opens_alone_where_memory_or_time_are_short_or_another_row_is_between(
    gpu: ModuleType, sides: Sides, tmp_path: Path, gib: float, seconds: float, between: bool
) -> None:
    first, second = two_rows(gpu, gib)
    other = gpu.Row("evaluation", 60, lambda folder, toy: {"ratio": sides.running})
    rows = [first, *([other] if between else []), second]
    with measuring(gpu, rows, tmp_path) as measure:
        found = [measure(row, seconds) for row in rows]
    assert sides.most == 3 and not sides.running
    assert sides.limits == {gpu.LATEST}
    assert not between or found[1] == {"ratio": 0}


def test_sides_of_two_rows_start_together_and_share_of_busy_time_is_of_the_same_steps(
    gpu: ModuleType, sides: Sides, tmp_path: Path
) -> None:
    rows = two_rows(gpu)
    with measuring(gpu, rows, tmp_path) as measure:
        assert [measure.seconds(row) for row in rows] == [60, 60]
        first = measure(rows[0], 500)
        assert sides.most == 6 and sides.running == 3
        assert measure.seconds(rows[1]) < 60, "it is open"
        second = measure(rows[1], 500)
    assert sides.most == 6 and not sides.running
    assert first["clips_a_step"] == 16 and second["clips_a_step"] == 128
    assert "opened_in_seconds" in first and "opened_in_seconds" not in second, "both were opened for the first"
    assert list(first["sides"]) == list(second["sides"]) == ["ours", "ours_graphs", "hf_16"]
    for figures in (*first["sides"].values(), *second["sides"].values()):
        assert figures["busy"] == pytest.approx(0.4), "of the same steps without a profiler"
        assert (figures["kernels_a_clip"], figures["launches_a_clip"]) == (2.0, 1.0)
        assert (figures["peak_gib"], figures["planned_gib"]) == (2.0, 2.1) and figures["first_turn_seconds"] >= 0
    # Steps of 16 clips: the first one by itself, turns of half an epoch, then 32 without and with a profiler.
    assert sides.taken["t5_small", "micro=8"] == [1, 64, 64, 64, 32, "profile 32"]
    assert sides.taken["t5_base", "micro=8"] == [1, 16, 16, 16, 16, 16, "profile 16"]
    assert sides.taken["t5_base", "micro=16"] == [1, 2, 2, 2, 2, "profile 1"], "128 clips of a peer are enough"


def test_as_many_micro_batches_are_profiled_whatever_the_steps_are(gpu: ModuleType) -> None:
    """A step of T5-3B in 4 bits has some 80,000 kernels in its eight micro-batches."""
    ways = {"small": ("ours", "training.micro_batch_size=16"), "whole": ("bare", "training.micro_batch_size=128")}
    row = gpu.Training("t5_3b_qlora", 128, 15, ways | {"hf_16": ("hf", "training.micro_batch_size=16")})
    assert [row.profiled(side, toy=False) for side in row.sides] == [4, 16, 1]
    assert row.steps("small", toy=False) == row.steps("whole", toy=False) == 16


@pytest.mark.parametrize("seconds", [500, 0.5])
def test_a_row_that_hangs_is_ended_and_what_was_measured_stays(
    gpu: ModuleType, sides: Sides, tmp_path: Path, seconds: float
) -> None:
    rows = [row._replace(seconds=0.4) for row in two_rows(gpu)]
    sides.hangs_at = ("t5_small", "compile=graphs", 3)
    with measuring(gpu, rows, tmp_path) as measure:
        found = measure(rows[0], seconds)
        assert "ended_after_seconds" in found
        assert found["sides"]["ours"]["clips_per_second"] > 0
        assert "error" in found["sides"]["ours_graphs"]
        assert not sides.running, "nothing is left of it, nor of the row that was opened with it"
        assert "ended_after_seconds" not in measure(rows[1], 500), "the next one starts afresh"


def test_a_row_whose_run_is_ended_before_it_has_written_anything_is_no_end_of_the_others(
    gpu: ModuleType, tmp_path: Path
) -> None:
    def metrics_of_a_run(folder: Path, toy: bool) -> dict[str, float]:
        sys.modules["sides"]._is_over.wait()
        raise FileNotFoundError("metrics.jsonl")

    rows = [gpu.Row("resume", 0.1, metrics_of_a_run), gpu.Row("evaluation", 60, lambda folder, toy: {"ratio": 3.0})]
    with measuring(gpu, rows, tmp_path) as measure:
        assert set(measure(rows[0], 500)) == {"ended_after_seconds"}
        assert not sys.modules["sides"]._is_over.is_set() and measure(rows[1], 500) == {"ratio": 3.0}


def test_what_is_made_in_turns_that_count_is_said(gpu: ModuleType, sides: Sides, tmp_path: Path) -> None:
    rows = two_rows(gpu)[:1]
    with measuring(gpu, rows, tmp_path) as measure:
        found = measure(rows[0], 500)["sides"]
    assert found["ours_graphs"]["made_in_turns"] > 0 and found["ours_graphs"]["captured"] > 0


def test_a_profiler_that_sees_no_gpu_leaves_the_other_figures(gpu: ModuleType, sides: Sides, tmp_path: Path) -> None:
    sides.sees_gpu = False
    rows = two_rows(gpu)[:1]
    with measuring(gpu, rows, tmp_path) as measure:
        found = measure(rows[0], 500)["sides"]["ours"]
    assert found["busy"] == "not seen by the profiler" and "launches_a_clip" not in found
    assert found["clips_per_second"] > 0 and found["peak_gib"] == 2.0


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
def test_a_side_that_ends_has_its_error_and_the_others_are_measured(
    gpu: ModuleType, sides: Sides, tmp_path: Path, turns: int
) -> None:
    sides.broken = {"compile=graphs": turns}
    rows = two_rows(gpu)[:1]
    with measuring(gpu, rows, tmp_path) as measure:
        found = measure(rows[0], 500)["sides"]
    assert "ended" in found["ours_graphs"]["error"]
    assert ("clips_per_second" in found["ours_graphs"]) == (turns > 2), "its speed stays where its profile failed"
    assert found["ours"]["clips_per_second"] > 0 and found["hf_16"]["clips_per_second"] > 0
