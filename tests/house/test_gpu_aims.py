"""docs/benchmarks.md says what was asked of a GPU beside what was reached, and plainly what was not measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from tests.scripts import load_script, run_main

DEVICE = {"device": "NVIDIA H300", "torch": "2.13", "driver": "600"}
SPEEDS = {"hf_16": 100.0, "hf_best": 250.0, "bare": 300.0, "plain": 350.0, "fastest": 500.0}


@pytest.fixture(scope="module")
def aims() -> ModuleType:
    return load_script("benchmarks/gpu_aims.py")


@pytest.fixture(scope="module")
def results(aims: ModuleType) -> dict[str, Any]:
    """All rows that aims need, with figures of the names that ``gpu.py`` gives them."""
    ours = {"clips_per_second": 490.0, "mfu": 0.4, "busy": 0.9}
    sides = {"ours": ours, "ours_graphs": ours | {"clips_per_second": 600.0}}
    training = {"sides": sides | {side: {"clips_per_second": speed} for side, speed in SPEEDS.items()}}
    starts = {"first": {"added_seconds": 41.5}, "later": {"added_seconds": 9.5}, "written": {"added_seconds": 0.0}}
    found: dict[str, Any] = {
        "t5_base_starts": {"sides": starts},
        "evaluation": {"ratio": 3.7},
        "t5_base_as_typed": {"sides": {"1": {"data_wait_share": 0.001}, "2": {"data_wait_share": 0.03}}},
        "every_deepspeed_json": {"sides": {"zero2": {"farthest_from_zero1": 0.0003}, "zero3": {"error": "no room"}}},
        "resume_on_another_stage": {"farthest_from_whole": 0.0002},
    }
    rows = {aim.row: found.get(aim.row, training) for aim in aims.AIMS}
    return {name: row | {"clips_a_step": 128} | DEVICE for name, row in rows.items()}


def test_every_aim_is_read_from_a_row_of_the_benchmark(aims: ModuleType, results: dict[str, Any]) -> None:
    assert {aim.row for aim in aims.AIMS} <= {row.name for row in load_script("benchmarks/gpu.py").ROWS}
    table = {(row["row"], row["what"]): row for row in aims.aims_of(results)}
    assert len(table) == len(aims.AIMS) and all(row["reached"] != aims.NOT_MEASURED for row in table.values())
    figures = {(row, what.rpartition(": ")[2]): found for (row, what), found in table.items()}
    asked = figures["t5_small_128", "by Seq2SeqTrainer with micro-batches of 16"]
    assert (asked["asked"], asked["reached"], asked["as graphs"]) == (">= 4", 4.9, 6.0)
    assert figures["t5_base_128", "by Seq2SeqTrainer at its best"]["reached"] == pytest.approx(490 / 250)
    assert figures["t5_base_128", "by the fastest bare loop"]["reached"] == pytest.approx(0.98)
    assert figures["t5_large", "MFU"]["reached"] == 0.4 and figures["t5_3b_lora", "MFU"]["asked"] == ">= 0.45"
    assert figures["t5_base_as_typed", "share of the time that ranks wait for data"]["reached"] == 0.03, "the most"
    assert figures["t5_base_starts", "seconds that it adds to a later start"]["reached"] == 9.5


def test_what_was_not_measured_is_said(aims: ModuleType, results: dict[str, Any]) -> None:
    assert not aims.aims_of({}), "nothing was measured: no table"
    some = {"t5_base_16": results["t5_base_16"], "evaluation": {"error": "no room"} | DEVICE}
    sides = results["t5_base_16"]["sides"]
    some["t5_base_16"] = results["t5_base_16"] | {
        "sides": sides | {"ours": {"clips_per_second": 300.0, "busy": "not seen by the profiler"}}
    }
    by_what = {row["what"]: row for row in aims.aims_of(some)}
    assert by_what["T5-Base, 16 clips a step: by Seq2SeqTrainer"]["reached"] == 3.0
    assert by_what["T5-Base, 16 clips a step: busy"]["reached"] == ""
    assert by_what["T5-Base, 16 clips a step: busy"]["as graphs"] == 0.9
    left = [row for row in by_what.values() if row["reached"] == aims.NOT_MEASURED]
    assert len(left) == len(aims.AIMS) - 2


def test_the_page_and_its_picture_are_drawn_from_a_folder(results: dict[str, Any], tmp_path: Path) -> None:
    error = {"error": "bare ended during its turn:\nTraceback\nOutOfMemoryError: no room\n"}
    failed = {"t5_large": results["t5_large"] | {"sides": results["t5_large"]["sides"] | {"bare": error}}}
    (tmp_path / "gpu.json").write_text(json.dumps(results | failed))
    importlib.import_module("matplotlib.pyplot")  # which reads the methods of Axes
    with mock.patch("matplotlib.axes.Axes.set_title") as title:
        done = run_main("benchmarks/page.py", "--results", tmp_path, "--page", tmp_path / "page.md")
    assert not done.returncode, done.stderr
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| OutOfMemoryError: no room |\n" in text and "Traceback" not in text
    assert "pictures/gpu.png" in text and "| >= 0.95 | 0.98 | 1.2 | t5_base_128 | NVIDIA H300 |" in text
    assert (tmp_path / "pictures" / "gpu.png").stat().st_size > 10_000
    many = "x.h:1: fatal error: cusparse.h\n...\n" + "nvcc -O3 " * 50
    assert load_script("benchmarks/page.py").failure(many) == "x.h:1: fatal error: cusparse.h"
    titles = [call.args[0] for call in title.call_args_list]
    assert titles and all("NVIDIA H300" in words for words in titles)


def test_a_page_without_a_row_that_has_peers_has_no_picture(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"evaluation": results["evaluation"]}))
    done = run_main("benchmarks/page.py", "--results", tmp_path, "--page", tmp_path / "page.md")
    assert not done.returncode, done.stderr
    assert "| 3.7 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert not (tmp_path / "pictures").exists()


def test_a_panel_has_the_sides_of_all_rows_of_its_steps(aims: ModuleType, results: dict[str, Any]) -> None:
    """Not all sides fit a GPU at the same time: they are measured in rows of their own."""
    own = results["t5_large"] | {"sides": {"ours": {"clips_per_second": 490.0}}}
    peers = own | {"sides": {"hf_16": {"clips_per_second": 100.0}}}
    loops = own | {"sides": {"bare": {"error": "no room"}, "plain": {"clips_per_second": 300.0}}}
    panels = aims.panels_of({"t5_large": own, "t5_large_peers": peers, "t5_large_loops": loops, "t5_3b_lora": own})
    assert list(panels) == ["t5_large"] and list(panels["t5_large"]["sides"]) == ["ours", "hf_16", "bare", "plain"]
    elsewhere = {"t5_large": own, "t5_large_peers": peers | {"device": "another"}}
    assert not aims.panels_of(elsewhere)
