"""A rank that stops answering ends the run with its name; one that is busy does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hidden_gpus import python_path
from tests.time_limits import limit

ROOT = Path(__file__).parents[3]
CASES = [
    *(("1", "stops"), ("0", "stops"), ("1", "lags"), ("1", "evaluates")),
    *(("1", "waits for data"), ("0", "waits for data"), ("1", "starves"), ("1", "stops while it waits for data")),
]
Ended = dict[tuple[str, str], "End"]


@dataclass(frozen=True)
class End:
    """Of a case: exit code, output and errors of the rank that was not lost; the lost one's process id and errors."""

    code: int
    out: str
    err: str
    pid: int
    lost_err: str


def start(lost_rank: str, how: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_watch_worker.py")), lost_rank, how],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": python_path(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def ended() -> Ended:
    started = {case: start(*case) for case in CASES}
    results = {}
    try:
        for (lost_rank, how), processes in started.items():
            witness, lost = processes[1 - int(lost_rank)], processes[int(lost_rank)]
            out, err = witness.communicate(timeout=limit(600))
            if how in ("waits for data", "starves"):
                lost.wait(timeout=limit(600))
            lost.kill()
            results[lost_rank, how] = End(witness.returncode, out, err, lost.pid, lost.communicate()[1])
    finally:
        for processes in started.values():
            for process in processes:
                process.kill()
                process.communicate()
    return results


@pytest.mark.process
def test_a_rank_without_a_heartbeat_is_named(ended: Ended) -> None:
    end = ended["1", "stops"]
    assert end.code == 1
    errors = [line for line in end.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "step 5 has waited for" in errors[0]
    assert f"rank 1 ({socket.gethostname()}, process {end.pid}) has no heartbeat" in errors[0]
    assert "lost: step 5" in end.out and "done" not in end.out


@pytest.mark.process
def test_rank_0_holds_the_store_and_is_named_when_it_is_lost(ended: Ended) -> None:
    end = ended["0", "stops"]
    assert end.code == 1
    assert "rank 0 has no heartbeat" in end.err
    assert "lost: step 5" in end.out


@pytest.mark.process
def test_a_rank_that_is_alive_and_late_is_named(ended: Ended) -> None:
    end = ended["1", "lags"]
    assert end.code == 1
    assert f"process {end.pid}) is alive and has not reached step 5" in end.err


@pytest.mark.process
def test_ranks_wait_for_one_that_evaluates(ended: Ended) -> None:
    end = ended["1", "evaluates"]
    assert (end.code, end.err.count("error:")) == (0, 0)
    assert "done" in end.out


@pytest.mark.process
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_for_its_data_reports_it_once_and_the_others_wait(ended: Ended, rank: str) -> None:
    end = ended[rank, "waits for data"]
    assert (end.code, end.err.count("error:")) == (0, 0)
    assert "done" in end.out
    notes = [line for line in end.lost_err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert f"rank {rank} ({socket.gethostname()}, process {end.pid}) has waited for its data" in notes[0]


@pytest.mark.process
def test_a_rank_whose_data_never_come_ends_the_run(ended: Ended) -> None:
    end = ended["1", "starves"]
    assert end.code != 0 and "done" not in end.out
    errors = [line for line in end.lost_err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "has waited for its data" in errors[0] and "training.data_timeout" in errors[0]


@pytest.mark.process
def test_a_rank_that_is_lost_while_it_waits_for_its_data_is_named(ended: Ended) -> None:
    end = ended["1", "stops while it waits for data"]
    assert end.code == 1
    assert f"rank 1 ({socket.gethostname()}, process {end.pid}) has no heartbeat" in end.err
