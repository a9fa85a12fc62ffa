"""Cells that are tried on this machine: which, what is printed of them, and those that fail."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.scripts import run_main
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.fitting import tuning
from toolkit.fitting.hardware import GIB, Card
from toolkit.fitting.trial import Speed
from toolkit.fitting.tuning import Cell, Outcome, cells_by_plan, cells_here, reason_of
from toolkit.planning.comparison import Comparison, Row
from toolkit.planning.sizes.choices import Candidate
from toolkit.planning.sizes.shapes import Limits

DEMO = ("demo", ["training.global_batch_size=40"])


def rows(**largest: int) -> Comparison:
    """JSONs by the most clips that fit, the fastest first."""
    every = [Row(name, max_micro_batch=most, seconds=1.0 + at) for at, (name, most) in enumerate(largest.items())]
    return Comparison([Row("refused", conflicts="it is"), *every[::-1]], every[0], "", [])


def test_the_fastest_jsons_are_tried_with_the_largest_micro_batches() -> None:
    comparison = rows(zero1=16, zero2=40, zero3=1, zero2_offload=64)
    assert cells_by_plan(comparison, world_size=2, clips=128, given=None) == [
        Cell("zero1", 16),
        Cell("zero1", 13),
        Cell("zero2", 32),
        Cell("zero2", 22),
        Cell("zero3", 1),
    ]


def test_what_a_run_would_choose_is_tried_first() -> None:
    row = Row("zero1", max_micro_batch=128, seconds=1.0, choice=Candidate(64, Limits(128, 19200), 1.0))
    own = Cell("zero1", 128, 19200)
    assert cells_by_plan(Comparison([row], row, "", []), 1, 128, None) == [own, Cell("zero1", 128)]
    command = tuning.command_of(Outcome(own, None, "", 0.0), "demo", ["training.micro_batch_frames=9", "data.fps=5"], 1)
    assert command.endswith("data.fps=5 training.micro_batch_size=128 training.micro_batch_frames=19200")
    whole = Row("zero1", max_micro_batch=128, seconds=1.0, choice=Candidate(128, Limits(128, None), 1.0))
    assert cells_by_plan(Comparison([whole], whole, "", []), 1, 128, None) == [Cell("zero1", 128), Cell("zero1", 64)]


def test_jsons_that_round_more_are_for_people_to_choose() -> None:
    coarse = Row("zero1_fp16", max_micro_batch=8, seconds=0.1, config={"fp16": {"enabled": True}})
    plain = Row("zero1", max_micro_batch=8, seconds=1.0)
    assert cells_by_plan(Comparison([coarse, plain], plain, "", []), 1, 8, None) == [Cell("zero1", 8), Cell("zero1", 4)]
    assert cells_by_plan(Comparison([coarse], None, "", []), 1, 8, None)[0] == Cell("zero1_fp16", 8), (
        "where it is asked for"
    )


def test_a_number_of_the_recipe_holds() -> None:
    comparison = rows(zero1=16, zero2=40)
    known = Row("zero1", plan=object(), seconds=1.0)  # type: ignore[arg-type]
    fits = Comparison([known, Row("zero2", lacking={"GPU memory": 1.0})], None, "", [])
    assert cells_by_plan(comparison, 2, 128, given=12) == [], "neither row has a plan"
    assert cells_by_plan(fits, 2, 128, given=12) == [Cell("zero1", 12)]


def test_cpus_try_the_own_json_and_those_that_move_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cards", lambda: [])
    ranks, cells = cells_here(*DEMO, ranks=2, only=None)
    assert ranks == 2
    assert cells == [Cell(name, size) for name in ("zero1", "zero0", "zero2") for size in (8, 20)]
    assert cells_here(*DEMO, ranks=2, only="zero3")[1] == [Cell("zero3", 8), Cell("zero3", 20)]
    assert cells_here("demo", ["training.micro_batch_size=5"], 1, "zero2")[1] == [Cell("zero2", 5)]


@pytest.mark.parametrize("wrong", ["data.corpus={folder}", "model.backbone={folder}"])
def test_what_is_wrong_with_all_cells_is_an_error_before_the_first(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "cards", lambda: [])
    with pytest.raises(UserError, match=str(tmp_path)):
        cells_here("demo", [*DEMO[1], wrong.format(folder=tmp_path)], ranks=2, only=None)


def test_gpus_try_what_the_plan_finds_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cards", lambda: [Card("H100", 80 * GIB, 70 * GIB)] * 2)
    ranks, cells = cells_here(*DEMO, ranks=None, only="zero2")
    assert ranks == 2
    assert cells == [Cell("zero2", 20), Cell("zero2", 10)]
    with pytest.raises(UserError, match=r"--ranks 3 .* 2 GPUs ") as error:
        cells_here(*DEMO, ranks=3, only="zero2")
    assert "--ranks 2" in error.value.hint


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Replaces the launcher by a script that gets the words of a cell's start; none of them needs a GPU."""
    monkeypatch.setattr(tuning, "cards", lambda: [])

    def machine(script: str) -> None:
        file = tmp_path / "launcher.py"
        file.write_text(f"import json, sys\ntrial = json.load(open(sys.argv[-1]))\n{script}")
        monkeypatch.setattr(tuning, "_launcher", lambda ranks: [sys.executable, str(file)])

    return machine


WORKS = """
clips = int([word for word in trial["overrides"] if "micro_batch_size" in word][-1].partition("=")[2])
if trial["deepspeed"] == "zero2":
    print("error: rank 1: no memory is left\\nhint: none")
    sys.exit(1)
speed = {"clips_per_second": 10 * clips + trial["steps"], "peak_gib": 1.5, "batch": ""}
open(trial["result"], "w").write(json.dumps(speed))
"""


def tune_demo(*more: str) -> Any:
    return run_main("launch/plan.py", "--recipe", "demo", "--tune", "--ranks", "2", *more, *DEMO[1])


@pytest.mark.process
def test_each_cell_is_a_line_and_a_failed_one_says_why(machine: Callable[[str], None]) -> None:
    machine(WORKS)
    done = tune_demo("--steps", "4")
    assert done.returncode == 0, done.stderr
    assert "6 cells of 4 steps on 2 ranks" in done.stdout
    assert "[2/6] zero1 with micro-batches of 20: 204 clips/s, 1.50 GiB a rank" in done.stdout
    assert "[5/6] zero2 with micro-batches of 8 failed: rank 1: no memory is left" in done.stdout
    command = "deepspeed --num_gpus 2 launch/train.py --recipe demo --ds zero1 training.global_batch_size=40"
    assert done.stdout.rstrip().endswith(f"{command} training.micro_batch_size=20")
    table = done.stdout[done.stdout.index("DeepSpeed JSON") :]
    assert table.index("zero1") < table.index("zero2"), "the fastest first"


@pytest.mark.process
def test_json_holds_every_cell_and_the_command(machine: Callable[[str], None]) -> None:
    machine(WORKS)
    found = json.loads(tune_demo("--json").stdout)
    assert [cell["problem"] is None for cell in found["cells"]] == [True] * 4 + [False] * 2
    unset = {"micro_batch_frames": None, "recomputes": None}
    assert found["fastest"] == {"deepspeed": "zero1", "micro_batch_size": 20, **unset}
    assert "--ds zero1" in found["command"]


@pytest.mark.process
def test_a_machine_on_which_every_cell_fails_is_an_error(machine: Callable[[str], None]) -> None:
    machine("sys.exit(-9)")
    done = tune_demo("--ds", "zero2")
    assert done.returncode == 2
    assert "exit code -9" in done.stderr or "exit code 247" in done.stderr


def test_ctrl_c_prints_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cards", lambda: [])

    def attempt(script: Path, recipe: str, overrides: Sequence[str], cell: Cell, ranks: int, steps: int) -> Outcome:
        if cell == Cell("zero0", 8):
            raise KeyboardInterrupt
        return Outcome(cell, Speed(clips_per_second=float(cell.micro_batch_size), peak_gib=1.0, batch=""), "", 3.0)

    monkeypatch.setattr(tuning, "try_cell", attempt)
    done = tune_demo()
    assert done.returncode == 0
    assert "interrupted" in done.stdout
    assert "--ds zero1 training.global_batch_size=40 training.micro_batch_size=20" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_reaches_the_ranks_of_a_cell(
    machine: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    started = tmp_path / "started"
    machine(f"import os, signal, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\n"
            f"os.kill(os.getppid(), {int(number)})\ntime.sleep(600)")  # fmt: skip
    done = tune_demo()
    assert done.returncode == 0 and "interrupted" in done.stdout
    assert not psutil.pid_exists(int(started.read_text()))
    assert not list((tmp_path / "temporary").iterdir())
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("warning\nerror: rank 1 (node): no memory\nhint: less\nerror: another", "rank 1 (node): no memory"),
        ("Traceback\n  File\ntorch.OutOfMemoryError: CUDA out of memory\n", "OutOfMemoryError: CUDA out of memory"),
        ("", "its ranks ended with exit code -9"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(output: str, reason: str) -> None:
    assert reason_of(output, -9) == reason


@pytest.mark.process
@pytest.mark.nightly
def test_two_cells_of_a_small_recipe_on_one_rank(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the launcher and the ranks that users have."""
    monkeypatch.setattr(tuning, "CPU_SIZES", (2, 4))
    small = ("model.tiny=true", "training.global_batch_size=4", "training.workers=0")
    arguments = ("--recipe", "demo", "--tune", "--ranks", "1", "--steps", "2", "--ds", "zero1", "--json")
    done = run_main("launch/plan.py", *arguments, f"data.corpus={corpus.path}", "data.source=table", *small)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [cell["micro_batch_size"] for cell in found["cells"]] == [2, 4]
    for cell in found["cells"]:
        assert cell["problem"] is None
        assert cell["clips_per_second"] > 0 and 0.1 < cell["peak_gib"] < 8
