"""A rank that stops answering ends the run with its name; one that is busy does not."""

from __future__ import annotations

import contextlib
import os
import signal
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
    *(("1", "stops"), ("0", "stops"), ("1", "lags"), ("1", "evaluates"), ("1", "compiles")),
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


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder, worker = tmp_path_factory.mktemp("ranks"), Path(__file__).with_name("rank_watch_worker.py")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in CASES]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        ports = [str(listener.getsockname()[1]) for listener in listeners]
    words = [":".join([*case, port]) for case, port in zip(CASES, ports, strict=True)]
    process = subprocess.Popen(
        [sys.executable, str(worker), str(folder), *words],
        env=os.environ | {"PYTHONPATH": python_path(ROOT)},
        start_new_session=True,
    )
    try:
        assert process.wait(limit(600)) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return {(lost, how): end_of(folder / f"{how}_{lost}", int(lost)) for lost, how in CASES}


def end_of(folder: Path, lost: int) -> End:
    """What the ranks of a case left in its folder."""
    out, err = ((folder / f"{1 - lost}.{kind}").read_text() for kind in ("out", "err"))
    pid, lost_err = ((folder / f"{lost}.{kind}").read_text() for kind in ("pid", "err"))
    return End(int((folder / "code").read_text()), out, err, int(pid), lost_err)


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
@pytest.mark.parametrize("how", ["evaluates", "compiles"])
def test_ranks_wait_for_one_that_is_busy(ended: Ended, how: str) -> None:
    end = ended["1", how]
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
