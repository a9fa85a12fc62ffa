"""A rank that stops answering ends the run with its name; one that is busy does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [("1", "stops"), ("0", "stops"), ("1", "lags"), ("1", "evaluates")]


def start(lost_rank: str, how: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("watch_worker.py")), lost_rank, how],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def ended() -> dict[tuple[str, str], tuple[int, str, str, int]]:
    """Exit code, output and errors of the rank that was not lost, and the lost one's process id; of each case."""
    started = {case: start(*case) for case in CASES}
    results = {}
    try:
        for (lost_rank, how), processes in started.items():
            witness = processes[1 - int(lost_rank)]
            out, err = witness.communicate(timeout=120)
            results[lost_rank, how] = (witness.returncode, out, err, processes[int(lost_rank)].pid)
    finally:
        for processes in started.values():
            for process in processes:
                process.kill()
                process.communicate()
    return results


def test_a_rank_that_gives_no_sign_of_life_is_named(ended: dict[tuple[str, str], tuple[int, str, str, int]]) -> None:
    code, out, err, pid = ended["1", "stops"]
    assert code == 1
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "step 5 has waited for" in errors[0]
    assert f"rank 1 ({socket.gethostname()}, process {pid}) gives no sign of life" in errors[0]
    assert "told: step 5" in out and "done" not in out


def test_rank_0_keeps_the_store_and_is_named_when_it_is_lost(
    ended: dict[tuple[str, str], tuple[int, str, str, int]],
) -> None:
    code, out, err, _ = ended["0", "stops"]
    assert code == 1
    assert "rank 0 gives no sign of life" in err
    assert "told: step 5" in out


def test_a_rank_that_lives_and_does_not_come_is_named(ended: dict[tuple[str, str], tuple[int, str, str, int]]) -> None:
    code, _, err, pid = ended["1", "lags"]
    assert code == 1
    assert f"process {pid}) lives, and has not come to step 5" in err


def test_an_evaluation_is_waited_for(ended: dict[tuple[str, str], tuple[int, str, str, int]]) -> None:
    code, out, err, _ = ended["1", "evaluates"]
    assert (code, err.count("error:")) == (0, 0)
    assert "done" in out
