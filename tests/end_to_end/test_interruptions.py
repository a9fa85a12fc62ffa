"""A run resumes to the same losses, to the last bit, however it is stopped, and leaves no files behind.

One run is stopped many times and resumes each time, so that each way to stop costs one start. Most starts are cheap, by
``warm_launcher.py``; some are DeepSpeed's own command.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.by_night import cases, is_night
from tests.end_to_end.warm_runs import PATIENCE, Run, Warm, status_of, wait_for_the_end
from tests.time_limits import limit

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TARGETS = ("runner", "launch", "one rank", "group")
# What the shell sees. A rank's own code reaches it only when the ranks alone were signalled.
CODES = {
    ("runner", signal.SIGTERM): -15,
    ("runner", signal.SIGUSR1): -10,
    ("runner", signal.SIGINT): -2,
    ("launch", signal.SIGTERM): 1,
    ("launch", signal.SIGUSR1): 0,
    ("launch", signal.SIGINT): 1,
    ("one rank", signal.SIGTERM): 75,
    ("one rank", signal.SIGUSR1): 75,
    ("one rank", signal.SIGINT): 75,
    ("group", signal.SIGTERM): -15,
    ("group", signal.SIGUSR1): -10,
    ("group", signal.SIGINT): -2,
}
WAYS = [(target, number) for target in TARGETS for number in SIGNALS]
WAYS_BY_DAY = [
    *((target, signal.SIGTERM) for target in TARGETS),
    ("one rank", signal.SIGUSR1),
    ("group", signal.SIGINT),
]
STEPS = 72  # more than all interruptions together let pass
KILLS = 5
KILLS_BY_NIGHT = 50

Losses = Callable[[Path], list[float]]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for temporary files of all runs under the warm launcher, which they must leave empty."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def warm(warm: Warm, temporary: Path) -> Warm:
    return warm.having(TMPDIR=str(temporary))


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    """A run with dropout and augmentation, so that every source of randomness must be restored."""
    return [
        *("--recipe", "t5_small", "--ds", "zero2", *settings, "ds.data_types=null"),
        *("training.epochs=99", f"training.max_steps={STEPS}", "training.eval_every=99", "training.save_every=2"),
        *("augmentation.noise=0.02", "augmentation.speed=0.2", "training.log_every=1"),
    ]


@pytest.fixture(scope="module")
def undisturbed_run(warm: Warm, arguments: list[str], tmp_path_factory: Any) -> Path:
    run = warm.start(tmp_path_factory.mktemp("undisturbed") / "run", arguments)
    assert run.wait() == 0, run.said()
    return run.folder


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run: Path, losses: Losses) -> list[float]:
    return losses(undisturbed_run)


def test_forked_ranks_see_no_gpu(undisturbed_run: Path) -> None:
    environment = json.loads((undisturbed_run / "environment.json").read_text())
    assert environment["variables"]["CUDA_VISIBLE_DEVICES"] == ""


def steps_logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def wait_for_steps(run: Run, more: int) -> None:
    """Wait until the run has done ``more`` steps since it started or resumed."""
    deadline, resumed_at = time.monotonic() + limit(PATIENCE), None
    while time.monotonic() < deadline:
        if resumed_at is None and "training: " in run.said():
            resumed_at = steps_logged(run.folder)
        if resumed_at is not None and steps_logged(run.folder) >= resumed_at + more:
            return
        time.sleep(0.02)
    pytest.fail(f"{more} steps did not come in time: {run.said()}")


def wait_until_it_says(run: Run, words: str) -> None:
    deadline = time.monotonic() + limit(PATIENCE)
    while words not in run.said():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.02)


def signal_to(run: Run, target: str, number: signal.Signals) -> None:
    if target == "group":
        os.killpg(run.runner.pid, number)
    elif target == "runner":
        run.runner.send_signal(number)
    elif target == "launch":
        run.ranks()[0].parent().send_signal(number)
    else:
        run.ranks()[1].send_signal(number)


@pytest.fixture(scope="module")
def stopped(
    warm: Warm, arguments: list[str], losses: Losses, tmp_path_factory: Any, request: pytest.FixtureRequest
) -> tuple[dict[Any, dict[str, Any]], list[float]]:
    """What was seen at each way to stop one and the same run, and the losses of that run in the end."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    seen: dict[Any, dict[str, Any]] = {}
    for target, number in WAYS if is_night(request) else WAYS_BY_DAY:
        run = warm.start(folder, arguments)
        wait_for_steps(run, 2)
        processes = run.processes()
        signal_to(run, target, number)
        code = run.wait()
        wait_for_the_end(processes)
        seen[target, number] = {"code": code, "said": run.said(), "steps": steps_logged(folder), **status_of(folder)}
    run = warm.start(folder, [*arguments, "training.time_limit=0.02"])
    code = run.wait()
    seen["time limit"] = {"code": code, "said": run.said(), "steps": steps_logged(folder), **status_of(folder)}
    run = warm.start(folder, arguments)
    assert run.wait() == 0, run.said()
    return seen, losses(folder)


@pytest.mark.parametrize("way", cases(WAYS, WAYS_BY_DAY), ids=lambda way: f"{way[0]}-{way[1].name}")
def test_every_signal_to_every_process_saves_and_stops_all_of_them(
    stopped: Any, way: tuple[str, signal.Signals]
) -> None:
    target, number = way
    seen = stopped[0][target, number]
    assert seen["status"] == "interrupted", seen["said"]
    assert seen["code"] == CODES[target, number], seen["said"]
    assert len(re.findall(r"^interrupted: ", seen["said"], re.MULTILINE)) == 1, seen["said"]
    assert f"after step {seen['steps']} of {STEPS}" in seen["said"]
    reasons = {"runner": ["the launcher's death"], "launch": ["the launcher's death"]}.get(target, [number.name])
    if target == "launch" and number != signal.SIGUSR1:
        reasons = ["SIGTERM"]  # which launch.py passes on
    if target == "group":
        reasons += ["SIGTERM"]  # which launch.py may pass on before the first rank has got its own signal
    # The ranks may agree to stop before the first has seen what others have; a signal to the second it never sees.
    reasons = ["a signal to another rank", *(reasons if target != "one rank" else [])]
    assert any(f"interrupted: stopped by {reason} " in seen["said"] for reason in reasons), seen["said"]


def test_the_time_limit_saves_and_stops(stopped: Any) -> None:
    seen = stopped[0]["time limit"]
    assert (seen["code"], seen["status"]) == (75, "interrupted"), seen["said"]
    assert "interrupted: stopped by the time limit after step" in seen["said"]


def test_nothing_that_was_done_before_a_stop_is_done_again(stopped: Any) -> None:
    ways = list(stopped[0].values())
    for before, after in itertools.pairwise(ways):
        assert f"step_{before['steps']:06d}" in after["said"]
        assert after["steps"] > before["steps"]


def test_a_run_that_was_stopped_again_and_again_has_the_losses_of_one_that_was_not(
    stopped: Any, undisturbed: list[float]
) -> None:
    assert stopped[1] == undisturbed


def real_start(
    how: str, folder: Path, arguments: list[str], surroundings: dict[str, str], command: Callable[..., list[str]]
) -> Run:
    """Start a run by the very commands that users type."""
    words = command("launch/train.py", *arguments, f"run.dir={folder}", ranks=2)
    if how == "script":
        port = words[words.index("--master_port") + 1]
        words = ["bash", str(ROOT / "launch" / "train_multi_gpu.sh"), arguments[1], "2", *words[words.index("--ds") :]]
        surroundings = surroundings | {"MASTER_PORT": port}
    out = folder.with_suffix(".txt")
    with out.open("w") as said:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=surroundings,
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Run(psutil.Process(process.pid), folder, out, process.wait)


def test_ctrl_c_of_the_real_launcher_is_one_line(
    arguments: list[str],
    surroundings: dict[str, str],
    command: Callable[..., list[str]],
    warm: Warm,
    train_here: Callable[..., Any],
    undisturbed: list[float],
    losses: Losses,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    run = real_start("script", folder, arguments, surroundings, command)
    wait_for_steps(run, 2)
    processes = run.processes()
    os.killpg(run.runner.pid, signal.SIGINT)
    run.wait()
    wait_for_the_end(processes)
    assert status_of(folder)["status"] == "interrupted", run.said()
    assert "Traceback" not in run.said()
    assert len(re.findall(r"^interrupted: ", run.said(), re.MULTILINE)) == 1, run.said()
    # SIGKILL to the real launcher and its ranks, and resume to the end.
    run = real_start("deepspeed", folder, arguments, surroundings, command)
    wait_for_steps(run, 3)
    processes = run.processes()
    os.killpg(run.runner.pid, signal.SIGKILL)
    wait_for_the_end(processes)
    changed = ["training.learning_rate=0.1", "training.label_smoothing=0.2", f"run.dir={folder}"]
    refused = train_here(*arguments, *changed)
    assert refused.code == 2, refused.err
    assert "training.label_smoothing 0.1 -> 0.2, training.learning_rate 0.0003 -> 0.1" in refused.err
    run = warm.start(folder, arguments)
    assert run.wait() == 0, run.said()
    assert losses(folder) == undisturbed


def kill_and_resume(
    kills: int, warm: Warm, arguments: list[str], losses: Losses, folder: Path, seed: int
) -> list[float]:
    """Kill all processes of a run at a random moment, so many times, then let it end."""
    moments = random.Random(seed)
    for number in range(kills):
        run = warm.start(folder, arguments)
        if number % 5 == 0:  # at any moment of the start, too
            time.sleep(moments.uniform(0, 3))
        else:
            wait_for_steps(run, moments.randint(1, 3))
            time.sleep(moments.uniform(0, 0.3))
        processes = run.processes()
        os.killpg(run.runner.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.said()
        wait_for_the_end(processes)
        assert status_of(folder)["status"] == "running" if (folder / "status.json").exists() else number == 0
    run = warm.start(folder, arguments)
    assert run.wait() == 0, run.said()
    return losses(folder)


def leftovers(folder: Path, temporary: Path) -> list[str]:
    """What no run may leave: unfinished checkpoints, files to swap, temporary files, shared memory."""
    unfinished = [str(path) for path in folder.rglob("*partial*")]
    swapped = [str(path) for path in folder.rglob("nvme_swap*")]
    shared = [str(path) for path in Path("/dev/shm").glob(f"deepspeed_*_{os.getuid()}_*") if is_old_and_ours(path)]
    # torch keeps one cache for all runs of a user, named after them, and fills it by gcc: killed while linking, that
    # leaves files such as ccDrdgim.res.
    torchs = re.compile(r"torchinductor_.*|cc\w{6}\..*")
    files = [
        str(path) for path in temporary.iterdir() if not torchs.fullmatch(path.name) and not is_deepspeeds_probe(path)
    ]
    return unfinished + swapped + files + shared


def is_deepspeeds_probe(path: Path) -> bool:
    """DeepSpeed compiles a small program in every CPU rank that starts; killed meanwhile, that leaves its folder."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= {"test.c", "test.o", "a.out", "stderr.txt"}


def is_old_and_ours(path: Path) -> bool:
    """Runs of others may start beside this test; a buffer lives for a moment only."""
    time.sleep(2)
    return path.exists()


def test_a_run_that_is_killed_at_random_moments_resumes_to_the_same_losses(
    warm: Warm, arguments: list[str], undisturbed: list[float], losses: Losses, tmp_path: Path, temporary: Path
) -> None:
    folder = tmp_path / "run"
    assert kill_and_resume(KILLS, warm, arguments, losses, folder, seed=1) == undisturbed
    assert leftovers(folder, temporary) == []


@pytest.mark.nightly
def test_a_run_that_is_killed_after_an_evaluation_scores_its_best_model(
    warm: Warm, arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    often = ["training.eval_every=1", "training.save_every=4", "training.max_steps=14", "evaluation.select_by=cer"]
    for epoch in (1, 3):  # after steps 3 and 9; checkpoints are those of steps 4, 8, ...
        run = warm.start(folder, [*arguments, *often])
        wait_until_it_says(run, f"dev after epoch {epoch}: ")
        processes = run.processes()
        os.killpg(run.runner.pid, signal.SIGKILL)
        run.wait()
        wait_for_the_end(processes)
    run = warm.start(folder, [*arguments, *often])
    assert run.wait() == 0, run.said()
    best = json.loads((folder / "best" / "evaluation.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["best_step"] == best["step"]
    evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    errors = {entry["step"]: entry["dev_cer"] for entry in evaluations if entry["kind"] == "eval"}
    assert list(errors) == [3, 6, 9, 12, 14]
    assert best["scores"]["cer"] == min(errors.values()) == errors[best["step"]]
    assert sorted(path.name for path in folder.iterdir() if "best" in path.name) == ["best"]


@pytest.mark.nightly
def test_fifty_kills(warm: Warm, arguments: list[str], losses: Losses, tmp_path: Path, temporary: Path) -> None:
    longer = [f"training.max_steps={5 * STEPS}" if a.startswith("training.max_steps") else a for a in arguments]
    alone = warm.start(tmp_path / "undisturbed", longer)
    assert alone.wait() == 0, alone.said()
    folder = tmp_path / "run"
    assert kill_and_resume(KILLS_BY_NIGHT, warm, longer, losses, folder, seed=2) == losses(alone.folder)
    assert leftovers(folder, temporary) == []
