"""``training.micro_batch_size: auto`` on two ranks: rehearsals at all ZeRO stages, and what they must not change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.by_night import cases, is_night
from tests.end_to_end.conftest import Finished
from tests.rank_workers import prepared, run_worker
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import read_choice

STAGES = ("zero0", "zero1", "zero2", "zero3")
STAGES_BY_DAY = ("zero1", "zero3")
# Where one rank has no memory: under which JSON, in which part of a step.
BROKEN = [
    *(f"{ds}-{where}" for ds in STAGES for where in ("forward", "backward", "update")),
    "zero1-capture",
]
BY_DAY = ["zero2-backward", "zero3-forward"]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def start(
    fork: Callable[..., Finished], settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Results]:
    """Fits and trains cases on two ranks in one start."""
    folder = tmp_path_factory.mktemp("fitting")
    shared = [value for value in prepared(settings) if "micro_batch_size" not in value]

    def start(group: dict[str, dict[str, Any]]) -> Results:
        results: Results = run_worker(
            fork, "tests/end_to_end/fitting_worker.py", folder, ranks=2, cases=group, settings=shared
        )
        return results

    return start


@pytest.fixture(scope="module")
def fitted(start: Callable[..., Results], request: pytest.FixtureRequest) -> Results:
    night = is_night(request)
    stages = STAGES if night else STAGES_BY_DAY
    plan: dict[str, dict[str, Any]] = {ds: {"ds": ds, "folder": ds, "trains": True} for ds in stages}
    for name in BROKEN if night else BY_DAY:
        ds, where = name.split("-")
        graphs = ["training.compile=graphs"] if where == "capture" else []
        plan[name] = {"ds": ds, "folder": name, "breaks": where, "overrides": graphs}
    return start(plan)


@pytest.fixture(scope="module")
def plain(start: Callable[..., Results], fitted: Results) -> Results:
    """The same runs without a rehearsal, with the micro-batches that it has chosen."""
    given = {ds: case["choice"] for ds, case in fitted.items() if "weights" in case}
    return start(
        {ds: {"ds": ds, "folder": f"plain-{ds}", "trains": True, "given": choice} for ds, choice in given.items()}
    )


@pytest.mark.parametrize("ds", cases(STAGES, STAGES_BY_DAY))
def test_the_step_after_a_rehearsal_is_that_of_a_run_without_one(fitted: Results, plain: Results, ds: str) -> None:
    assert 1 <= fitted[ds]["choice"]["clips"] <= 4
    assert fitted[ds]["weights"] == plain[ds]["weights"], "bit for bit"


@pytest.mark.parametrize("name", cases(BROKEN, BY_DAY))
def test_one_rank_without_memory_makes_both_take_smaller_micro_batches(fitted: Results, name: str) -> None:
    case = fitted[name]
    assert case["choice"]["frames"] == case["longest"], "rank 1 has memory for one of the longest clips"


def test_a_command_with_auto_says_and_keeps_what_it_chose(
    fork: Callable[..., Finished], settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = [value for value in prepared(settings) if "micro_batch_size" not in value]
    auto = ["--ds", "auto", *own, "training.micro_batch_size=auto", "training.max_steps=2", "training.eval_every=99"]
    first = fork("launch/train.py", "--recipe", "t5_small", *auto, f"run.dir={tmp_path / 'run'}", ranks=2)
    assert first.code == 0, first.err[-2000:]
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert recipe.training.micro_batch_size == "auto"
    log = (tmp_path / "run" / "log.txt").read_text()
    for said in (f"--ds auto: {recipe.deepspeed}: ", "training.eval_every=99 and the run has"):
        assert said in first.out and said in log, said
    choice = read_choice(tmp_path / "run")
    assert choice is not None
    assert choice.in_words() in first.out
    assert choice.in_words() in log
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert len(losses) == 2 and losses[0] > 0


@pytest.mark.nightly
def test_on_other_hardware_a_run_chooses_again_and_its_losses_stay_equal(
    fork: Callable[..., Finished],
    settings: list[str],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = [value for value in prepared(settings) if "micro_batch_size" not in value]
    own += ["training.micro_batch_size=auto", "training.max_steps=4", "training.save_every=2", "training.eval_every=99"]
    own += ["training.log_every=1", "model.dropout=0", "model.pose_encoder.dropout=0", "ds.data_types=null"]
    words = ("--recipe", "t5_small", "--ds", "zero2", *own)
    folder, other = tmp_path / "run", tmp_path / "other"
    first = fork("launch/train.py", *words, f"run.dir={folder}", ranks=2)
    assert first.code == 0, first.err[-2000:]
    shutil.copytree(folder, other)
    (checkpoint,) = (other / "checkpoints").glob("step_*2")
    again = fork("launch/train.py", *words, f"run.dir={other}", "--resume", checkpoint, ranks=1)
    assert again.code == 0, again.err[-2000:]
    assert "other hardware" in again.out
    chosen = [read_choice(place) for place in (folder, other)]
    assert chosen[0] and chosen[1] and chosen[0].hardware != chosen[1].hardware
    whole, resumed = losses(folder), losses(other)
    assert len(whole) == 4 and resumed[-2:] == pytest.approx(whole[2:], rel=1e-4)
