"""A run directory is one command's at a time, and free again however that command ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toolkit.checkpointing import run_lock
from toolkit.errors import UserError

HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
if os.fork() == 0:  # as a loader process that outlives its rank
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that trains in ``run``, as far as locks can show."""
    started = []

    def start() -> subprocess.Popen[str]:
        (tmp_path / "run").mkdir(exist_ok=True)
        words = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / run_lock.LOCK)]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.communicate()


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    run_lock.release()


def test_another_command_is_kept_out(other: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    other()
    lines: list[str] = []
    with pytest.raises(UserError) as refusal:
        run_lock.claim(tmp_path / "run", lines.append, patience=0.3)
    assert str(tmp_path / "run") in refusal.value.message and "run.dir" in refusal.value.hint
    (line,) = lines
    assert str(tmp_path / "run") in line


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_was_killed_keeps_nobody_out(
    other: Callable[[], subprocess.Popen[str]], tmp_path: Path, how: signal.Signals
) -> None:
    process = other()
    process.send_signal(how)
    process.wait()
    run_lock.claim(tmp_path / "run", pytest.fail, patience=0)


def test_a_command_may_claim_twice(other: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    for _ in range(2):
        run_lock.claim(tmp_path / "run", pytest.fail, patience=0)
    asked = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    words = [sys.executable, "-c", asked, str(tmp_path / "run" / run_lock.LOCK)]
    assert subprocess.run(words, capture_output=True).returncode == 1
    run_lock.release()
    other()


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    run_lock.claim(tmp_path / "run", pytest.fail, patience=0)
