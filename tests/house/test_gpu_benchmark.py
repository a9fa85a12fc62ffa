"""benchmarks/gpu.py takes the most important rows first, writes each as it comes, and continues where it stopped."""

from __future__ import annotations

import json
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.recipe.resolving import run_of
from tests.scripts import load_script
from toolkit.recipe.compilation import compilation
from toolkit.recipe.deepspeed.json_file import ds_config_names

H100 = {"device": "H100", "torch": "2.13", "driver": "580"}
START = 15  # seconds of imports and of the corpus, before the first row


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_script("benchmarks/gpu.py")


def rows_of(gpu: ModuleType) -> ModuleType:
    """The module of its rows."""
    return sys.modules[gpu.Row.__module__]


class Machine:
    """A clock that runs while rows are measured, each as long as it says; rows in ``broken`` fail."""

    def __init__(self, gpu: ModuleType, path: Path) -> None:
        self.gpu, self.path, self.now = gpu, path, 100.0
        self.broken: set[str] = set()
        self.found: dict[str, Any] = {}  # of each row that is measured
        self.limits: list[float] = []
        self.written: list[list[str]] = []  # rows in the file when each measurement began
        self.rows = [gpu.Row(name, seconds, None) for name, seconds in (("a", 60), ("b", 90), ("c", 30))]

    def __call__(self, row: Any, seconds: float) -> dict[str, Any]:
        self.written.append(list(self.results()))
        self.limits.append(seconds)
        self.now += row.seconds
        if row.name in self.broken:
            raise RuntimeError("out of memory")
        return dict(self.found) or {"clips_per_second": row.seconds}

    def seconds(self, row: Any) -> float:
        return float(row.seconds)

    def results(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def take(self, minutes: float, device: dict[str, str] = H100, again: bool = False) -> list[str]:
        rows = self.rows if again else self.gpu.missing(self.rows, self.results(), device)
        left: list[str] = self.gpu.take(rows, self.path, device, self.now + 60 * minutes, self, clock=lambda: self.now)
        return left


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


def test_a_row_that_ran_out_of_time_is_taken_again(machine: Machine) -> None:
    machine.found = {"sides": {"ours": {"clips_per_second": 9.0}}, "ended_after_seconds": 60}
    machine.take(minutes=1)
    machine.found = {"sides": {"ours": {"clips_per_second": 9.0}, "bare": {"clips_per_second": 8.0}}}
    machine.take(minutes=1)
    assert "ended_after_seconds" not in machine.results()["a"]


def test_another_device_has_rows_of_its_own(machine: Machine) -> None:
    machine.take(minutes=10)
    machine.take(minutes=1, device=H100 | {"device": "H200"})
    assert [row["device"] for row in machine.results().values()] == ["H200", "H100", "H100"]
    assert machine.take(minutes=1, again=True) == ["b", "c"], "rows that are named are taken again"


def test_the_most_important_rows_fit_into_eight_minutes(gpu: ModuleType) -> None:
    names = [row.name for row in gpu.ROWS]
    assert len(set(names)) == len(names)
    assert sum(row.seconds for row in gpu.ROWS[:6]) <= 8 * 60 - START
    assert max(row.seconds for row in gpu.ROWS) <= 8 * 60, "a row that is longer would always be left for the next call"
    assert sum(row.seconds for row in gpu.ROWS) <= 30 * 60
    training = [row.measure for row in gpu.ROWS if isinstance(row.measure, gpu.Training)]
    assert max(row.gib for row in training) <= gpu.SHARE * 139.8, "an H200 holds the sides of each row"
    assert sum(row.gib for row in training[:2]) <= gpu.SHARE * 139.8, "and those of the first two"


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


class Sides:
    """Stands in for the processes of training rows: a turn takes a hundredth of a second a step, profiled or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.broken: dict[str, int] = {}  # setting of a side -> turns before it ends
        self.running, self.most = 0, 0
        self.taken: dict[tuple[str, str], list[int | str]] = {}  # orders of each recipe and first setting
        self.sees_gpu = True
        self.captured = 0
        self.hangs_at = ("", "", 0)  # recipe, setting, number of the turn
        monkeypatch.setattr(module, "started", self.started)
        monkeypatch.setattr(module, "take_turn", self.take_turn)
        self.over: threading.Event = sys.modules["sides"]._is_over

    @contextmanager
    def started(self, command: list[str]) -> Iterator[list[str]]:
        self.running += 1
        self.most = max(self.most, self.running)
        yield command
        self.running -= 1

    def take_turn(self, command: list[str], order: int | str) -> dict[str, Any]:
        for setting, left in self.broken.items():
            if setting in command:
                self.broken[setting] -= 1
                if not left:
                    raise SystemExit("ended during its turn")
        recipe = command[command.index("--recipe") + 1]
        self.taken.setdefault((recipe, command[3]), []).append(order)
        if self.hangs_at == (recipe, command[3], len(self.taken[recipe, command[3]])):
            self.over.wait()
        if self.over.is_set():
            raise SystemExit("no time was left")
        steps = int(str(order).split()[-1])
        # The first batches of an epoch are slower than the others.
        seconds = 0.01 * steps + 0.1 * min(steps, 32)
        turn = {"clips": 128 * steps, "seconds": seconds, "mfu": 0.5, "captured": self.captured, "compiled": 4}
        self.captured += "compile=graphs" in command and steps > 32
        found = turn | {"peak_gib": 2.0, "planned_gib": 2.1}
        return found | (
            {"busy_seconds": 0.4 * seconds, "kernels": 256 * steps, "launches": 128 * steps} if self.sees_gpu else {}
        )


@pytest.fixture
def sides(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Sides:
    return Sides(monkeypatch, sys.modules[gpu.Training.__module__])


def measuring(gpu: ModuleType, rows: list[Any], folder: Path) -> Any:
    return closing(gpu.Measuring(rows, folder, False, 100.0))


def two_rows(gpu: ModuleType, gib: float = 40.0) -> list[Any]:
    ways = {"ours": ("ours", "micro=8"), "ours_graphs": ("ours", "compile=graphs"), "hf_16": ("hf", "micro=16")}
    names = (("t5_small", 16), ("t5_base", 128))
    return [gpu.Row(name, 60, gpu.Training(name, clips, gib, ways)) for name, clips in names]


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


@pytest.mark.parametrize(("seconds", "limit"), [(500, 1), (0.5, 0.5)])
def test_a_row_that_hangs_is_ended_and_what_was_measured_stays(
    gpu: ModuleType, sides: Sides, tmp_path: Path, seconds: float, limit: float
) -> None:
    rows = [row._replace(seconds=0.4) for row in two_rows(gpu)]
    sides.hangs_at = ("t5_small", "compile=graphs", 3)
    with measuring(gpu, rows, tmp_path) as measure:
        found = measure(rows[0], seconds)
        assert found["ended_after_seconds"] == round(limit)
        assert found["sides"]["ours"]["clips_per_second"] > 0
        assert "error" in found["sides"]["ours_graphs"]
        assert not sides.running, "nothing is left of it, nor of the row that was opened with it"
        assert "ended_after_seconds" not in measure(rows[1], 500), "the next one starts afresh"


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
