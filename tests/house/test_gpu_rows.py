"""What the rows of benchmarks/gpu.py measure, and what stays of one whose parts fail."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.house.gpu_benchmark import rows_of
from tests.recipe.resolving import run_of
from tests.scripts import load_script
from toolkit.recipe.compilation import compilation
from toolkit.recipe.deepspeed.json_file import ds_config_names


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_script("benchmarks/gpu.py")


@pytest.mark.parametrize("recipe", ["t5_small", "t5_base", "t5_large", "t5_3b_lora", "t5_3b_qlora"])
def test_each_model_has_its_peers(gpu: ModuleType, recipe: str) -> None:
    rows = [row.measure for row in gpu.ROWS if isinstance(row.measure, gpu.Training) and row.measure.recipe == recipe]
    sides = {way for row in rows if row.clips == 128 for way, *_ in row.sides.values()}
    # Packed weights cannot be trained in fp32.
    fastest = {"fastest"} & sides if recipe in ("t5_small", "t5_base") else set()
    assert sides == {"ours", "hf", "bare", "plain", *fastest} - ({"plain"} if recipe == "t5_3b_qlora" else set())
    micro_batches = {setting for row in rows for way, *more in row.sides.values() if way == "hf" for setting in more}
    assert "training.micro_batch_size=16" in micro_batches


def test_no_way_of_training_is_refused_on_a_gpu(gpu: ModuleType) -> None:
    for row in gpu.ROWS:
        if isinstance(row.measure, gpu.Training):
            for side, (_, *settings) in row.measure.sides.items():
                more = ("model.from_scratch=true", f"training.global_batch_size={row.measure.clips}")
                resolved = run_of(row.measure.recipe, *settings, *more, has_gpu=True)
                graphs = compilation(resolved.recipe, resolved.deepspeed, has_gpu=True).graphs
                assert graphs == side.endswith("graphs"), (row.name, side)


def test_every_json_is_held_to_zero_1_of_its_model(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: dict[str, list[str]] = {}

    def train(folder: Path, run_dir: Path, settings: list[str], toy: bool) -> list[float]:
        name = run_dir.name.removeprefix("run_")
        started[name] = settings
        if name in ("zero3", "zero3_offload"):
            raise RuntimeError("out of memory") if name == "zero3" else SystemExit("no time was left")
        return [7.0, 6.0] if "bart" in " ".join(settings) else [5.0, 4.0 if name != "zero2" else 4.2]

    monkeypatch.setattr(rows_of(gpu), "train", train)
    found = rows_of(gpu).every_json(tmp_path, toy=False)["sides"]
    assert {name for name in ds_config_names() if "nvme" not in name} < found.keys()
    apart = {name: side.get("farthest_from_zero1") for name, side in found.items()}
    assert apart.pop("zero2") == 0.05 and apart.pop("zero3") is None and apart.pop("zero3_offload") is None
    assert set(apart.values()) == {0.0}
    assert "out of memory" in found["zero3"]["error"] and "no time" in found["zero3_offload"]["error"]
    for name, settings in started.items():
        overrides = [setting for setting in settings if not setting.startswith("deepspeed=")]
        ds = settings[0].removeprefix("deepspeed=")
        assert run_of("t5_small", *overrides, ds=ds, has_gpu=True).deepspeed, f"{name} is refused on one GPU"


@pytest.mark.parametrize("fails", ["", "compile=false", "compile=graphs"])
def test_starts_that_were_measured_stay_where_one_fails(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: str
) -> None:
    @contextmanager
    def started(command: list[str], environment: dict[str, str]) -> Iterator[list[str]]:
        if fails and any(fails in word for word in command):
            raise SystemExit("no time was left")
        yield command

    def take_turn(command: list[str], steps: int) -> dict[str, Any]:
        return {"compile_seconds": 3.5, "captured": 0}

    monkeypatch.setattr(rows_of(gpu), "started", started)
    monkeypatch.setattr(rows_of(gpu), "take_turn", take_turn)
    found = rows_of(gpu).starts(tmp_path, toy=False)["sides"]
    assert set(found) == {"first", "written", "later", "later_graphs"}
    failed = {"compile=false": {"written"}, "compile=graphs": {"later_graphs"}}.get(fails, set())
    assert {name for name, start in found.items() if "error" in start} == failed
    added = {name for name, start in found.items() if "added_seconds" in start}
    assert added == (set() if "written" in failed else found.keys() - failed)


def test_a_run_is_stopped_before_it_is_resumed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = [3]

    def train(folder: Path, run_dir: Path, settings: list[str], toy: bool, steps: int, stop_after: int = 0) -> Any:
        there = taken[0] if stop_after else steps
        return [2.0 if "zero1" in settings[0] else 2.1] * there

    rows = rows_of(gpu)
    monkeypatch.setattr(rows, "train", train)
    found = rows.resume_elsewhere(tmp_path, toy=False)
    assert found == {"steps": rows.STEPS_TO_STOP, "stopped_after": 3, "farthest_from_whole": 0.05}
    taken[0] = rows.STEPS_TO_STOP
    with pytest.raises(RuntimeError, match="SIGTERM"):
        rows.resume_elsewhere(tmp_path, toy=False)


def test_ranks_are_the_powers_of_two_and_all_devices(gpu: ModuleType) -> None:
    assert [rows_of(gpu).numbers_of_ranks(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_runs_own_figures_are_those_of_its_later_steps_and_of_its_plan(gpu: ModuleType, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "clips_per_second": rate, "data_wait_share": wait}
        for step, rate, wait in ((1, 1.0, 0.9), (2, 2.0, 0.5), (3, 100.0, 0.01), (4, 300.0, 0.03))
    ]
    peaks = {"start_allocated_gib": 9.0, "step_allocated_gib": 3.917, "step_planned_gib": 3.888}
    rows += [{"kind": "memory", "step_allocated_gib": 1.0}, {"kind": "eval"}, {"kind": "memory", **peaks}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rows_of(gpu).figures_of_run(tmp_path)
    assert found == {"clips_per_second": 200.0, "data_wait_share": 0.02, "peak_gib": 3.92, "planned_gib": 3.89}


def test_fewer_clips_of_generate_are_compared_by_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = load_script("benchmarks/evaluation.py")
    translated: list[range] = []

    def padded_batch(split: Any, clips: range, processor: Any, longest: int) -> Any:
        translated.append(clips)
        batch = SimpleNamespace(poses=list(clips), visible=None, frame_mask=None)
        batch.to = lambda device: batch
        return batch

    model = SimpleNamespace(config=SimpleNamespace(), generate=lambda clips, *_, **settings: clips)
    model.to = lambda device: model
    processor = SimpleNamespace(batch_decode=lambda clips: [f" text {clip}" for clip in clips])
    ours = [SimpleNamespace(hypothesis=f"text {clip}") for clip in range(40)]
    for name, stand_in in (
        ("load_translator", lambda path: (model, processor)),
        ("open_split", lambda *_: FortyClips(frames=np.full(40, 90))),
        ("padded_batch", padded_batch),
        ("translate_split", lambda *_, **settings: ours),
        ("evaluation_mode", lambda model: nullcontext()),
        ("own_device", lambda: torch.device("cpu")),
        ("take_turns", lambda plain, ours, repeats: ((plain(), ours()), 4.0, 8.0)),
    ):
        monkeypatch.setattr(evaluation, name, stand_in)
    found = evaluation.vs_plain_generate(Namespace(model="run", corpus=None, plain_clips=20, repeats=1))
    assert translated == [range(16), range(16, 20)]
    assert (found["clips"], found["clips_of_plain"], found["same_texts"]) == (40, 20, 20)
    assert (found["plain_clips_per_second"], found["ours_clips_per_second"], found["ratio"]) == (5.0, 5.0, 1.0)


class FortyClips(SimpleNamespace):
    def __len__(self) -> int:
        return 40
