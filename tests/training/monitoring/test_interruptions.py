"""Signals, the time limit and a dead parent set a flag and do nothing else."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from tests.time_limits import limit
from toolkit.errors import EXIT_AT_ONCE
from toolkit.training.monitoring.interruptions import SIGNALS, Interruptions


@pytest.fixture
def interruptions() -> Iterator[Interruptions]:
    # Under nohup SIGHUP is ignored, and stays so.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    watched = Interruptions()
    yield watched
    watched.close()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_reason_to_stop(interruptions: Interruptions, number: signal.Signals) -> None:
    assert not interruptions.wanted()
    os.kill(os.getpid(), number)
    assert interruptions.wanted()
    assert interruptions.reason == number.name


def close_after_signals(watched: Interruptions) -> str | None:
    """The reason to stop, after every signal so far was handled."""
    while select.select([watched._reader], [], [], 0)[0]:
        time.sleep(0.01)
    watched.close()
    return watched.reason


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGWINCH, signal.SIGALRM, signal.SIGPIPE, signal.SIGUSR2])
@pytest.mark.parametrize("stop", [None, signal.SIGTERM])
def test_other_signals_request_no_stop(number: signal.Signals, stop: signal.Signals | None) -> None:
    """Each has a handler in Python, so it is written to the pipe like those that request a stop."""
    watched = Interruptions()
    before = signal.signal(number, lambda *_: None)
    try:
        for sent in [number, number, *([stop] if stop else [])]:
            os.kill(os.getpid(), sent)
    finally:
        reason = close_after_signals(watched)
        signal.signal(number, before)
    assert reason == (stop and stop.name)


@pytest.mark.process
def test_workers_that_end_with_an_epoch_request_no_stop() -> None:
    watched = Interruptions()
    try:
        for _ in range(2):
            assert [int(item) for item in DataLoader(range(4), batch_size=None, num_workers=2)] == [0, 1, 2, 3]
    finally:
        reason = close_after_signals(watched)
    assert reason is None


# As in a collective that waits for another rank: one long call outside Python, in which no Python handler runs.
STUCK = """
import ctypes, os, signal, time
from toolkit.training.monitoring.interruptions import SECOND_CTRL_C_SECONDS, Interruptions
watched = Interruptions(at_once=lambda: print("at once", flush=True))
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
print(watched.reason, flush=True)
time.sleep(SECOND_CTRL_C_SECONDS + 0.2)
print("locks", flush=True)
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.process
def test_a_second_ctrl_c_stops_at_once_even_inside_a_collective() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["SIGINT", "locks"]
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "at once\n"
        assert process.wait(timeout=limit(60)) == EXIT_AT_ONCE


def test_ctrl_c_and_the_launchers_sigterm_are_one_request(interruptions: Interruptions) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruptions.reason == "SIGINT"


def test_the_time_limit() -> None:
    watched = Interruptions(time_limit=0.2 / 60)
    try:
        assert not watched.wanted()
        time.sleep(0.25)
        assert watched.wanted()
        assert watched.reason == "the time limit"
    finally:
        watched.close()


def test_close_restores_the_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    Interruptions().close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watched = Interruptions()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not watched.wanted()
    finally:
        watched.close()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.process
def test_a_dead_parent_is_noticed() -> None:
    child = (
        "import time\n"
        "from toolkit.training.monitoring.interruptions import Interruptions\n"
        "watched = Interruptions()\n"
        "print('ready', flush=True)\n"
        "while not watched.wanted(): time.sleep(0.05)\n"
        "print(watched.reason, flush=True)\n"
    )
    # The parent ends after the child has started. The pipe ends when the child does.
    reader, writer = os.pipe()
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(3)"
    subprocess.run([sys.executable, "-c", parent, child], stdout=writer, check=True)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.read().splitlines() == ["ready", "the launcher's death"]


FORKS_AND_CLOSES = """
import os, signal, time
from toolkit.training.monitoring.interruptions import Interruptions
interruptions = Interruptions()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
signal.signal(signal.SIGALRM, lambda *_: (os.kill(child, signal.SIGKILL), os._exit(1)))
signal.alarm(10)
interruptions.close()
os.kill(child, signal.SIGKILL)
"""


@pytest.mark.process
def test_close_does_not_wait_for_forked_processes() -> None:
    """A loader's workers keep every pipe of their parent open."""
    assert subprocess.run([sys.executable, "-c", FORKS_AND_CLOSES], timeout=limit(60)).returncode == 0
