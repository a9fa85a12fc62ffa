"""A run that is interrupted, by whichever signal, goes on as if nothing had happened: to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

Start = Callable[..., "subprocess.Popen[str]"]
STEPS = 24
PATIENCE = 120.0


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    """A run with dropout and augmentation, so that every source of randomness must be taken up where it was."""
    return [
        *("--recipe", "t5_small", "--ds", "zero2", *settings),
        *("training.epochs=8", f"training.max_steps={STEPS}", "training.eval_every=99", "training.save_every=5"),
        *("ds.data_types=null", "augmentation.noise=0.02", "augmentation.speed=0.2", "training.log_every=1"),
    ]


@pytest.fixture(scope="module")
def undisturbed(
    run: Callable[..., Any], losses: Callable[[Path], list[float]], arguments: list[str], tmp_path_factory: Any
) -> list[float]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("launch/train.py", *arguments, f"run.dir={run_dir}", ranks=2)
    assert done.code == 0, done.out + done.err
    return losses(run_dir)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"kind": "train"') >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} did not come within {PATIENCE:.0f} s")


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if any(word.startswith("--local_rank=") for word in child.cmdline())]


def interrupt(how: str, process: subprocess.Popen[str]) -> None:
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "one rank":
        ranks_of(process)[1].send_signal(signal.SIGTERM)
    elif how == "slurm":
        for rank in ranks_of(process):
            rank.send_signal(signal.SIGUSR1)


@pytest.mark.parametrize("how", ["ctrl-c", "one rank", "slurm"])
def test_an_interrupted_run_goes_on_to_the_same_losses(
    how: str,
    start: Start,
    run: Callable[..., Any],
    losses: Callable[[Path], list[float]],
    arguments: list[str],
    undisturbed: list[float],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    process = start("launch/train.py", *arguments, f"run.dir={run_dir}", ranks=2)
    wait_for_step(run_dir, 7, process)
    ranks = ranks_of(process)
    interrupt(how, process)
    said, _ = process.communicate(timeout=PATIENCE)
    psutil.wait_procs(ranks, timeout=PATIENCE)
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "interrupted", said
    done = len(losses(run_dir))
    assert 7 <= done < STEPS
    if how != "ctrl-c":  # a signal to the launcher itself hides the ranks' code
        assert process.returncode == 75, said
        assert "the same command goes on" in said
    again = run("launch/train.py", *arguments, f"run.dir={run_dir}", ranks=2)
    assert again.code == 0, again.out + again.err
    assert f"going on from {run_dir}/checkpoints/step_{done:06d}" in again.out
    assert losses(run_dir) == undisturbed


def test_a_killed_run_loses_only_what_came_after_its_last_checkpoint(
    start: Start,
    run: Callable[..., Any],
    losses: Callable[[Path], list[float]],
    arguments: list[str],
    undisturbed: list[float],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    process = start("launch/train.py", *arguments, f"run.dir={run_dir}", ranks=2)
    wait_for_step(run_dir, 8, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    changed = run("launch/train.py", *arguments, "training.learning_rate=0.1", f"run.dir={run_dir}", ranks=0)
    assert changed.code == 2
    assert changed.errors
    again = run("launch/train.py", *arguments, f"run.dir={run_dir}", ranks=2)
    assert again.code == 0, again.out + again.err
    assert "going on from" in again.out
    assert losses(run_dir) == undisturbed
