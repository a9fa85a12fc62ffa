"""Processes that train in one way each and take turns, as a benchmark starts and orders them; see ``turns.py``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

END = 500  # characters of an error that results keep

_groups: set[int] = set()  # of the processes that run
_errors: dict[int, IO[str]] = {}  # of each process that is ready, what it writes as errors
_is_over = threading.Event()  # from then on nothing is started


@contextmanager
def running(command: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of Python in a session of its own, which ends with the context, and all that it has started with it."""
    process = subprocess.Popen([sys.executable, *command], text=True, start_new_session=True, **more)
    _groups.add(process.pid)
    try:
        if _is_over.is_set():
            sys.exit("no time was left")
        yield process
    finally:
        _end_group(process.pid)
        _groups.discard(process.pid)
        with contextlib.suppress(BrokenPipeError):  # of an order that it did not read
            if process.stdin:
                process.stdin.close()
        process.wait()


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # the loaders' workers, too


def _end_of(errors: IO[str]) -> str:
    """The last lines, without NCCL's complaint of any process that an error has ended."""
    errors.seek(0)
    return "\n".join(line for line in errors.read().splitlines() if "destroy_process_group" not in line)[-30_000:]


def in_short(error: BaseException) -> str:
    """What of an error the results keep: its end, and before it the first line that a compiler calls an error.

    A compiler that fails says why long before its caller says that it failed.
    """
    text = str(error).strip()
    end = text[-END:]
    first = re.search(r"\b(?:fatal )?error: [^\n]{1,200}", text[:-END])
    return f"{first.group()}\n...\n{end}" if first else end


def _name(words: Any) -> str:
    """What of a command says which side it is, without the paths of a machine."""
    return " ".join(Path(word).name for word in map(str, words) if not word.startswith("-"))[: END // 4]


def _why(what: str, errors: IO[str]) -> str:
    return "no time was left" if _is_over.is_set() else f"{what}:\n{_end_of(errors)}"


@contextmanager
def _limited(process: subprocess.Popen[str], seconds: float | None) -> Iterator[threading.Event]:
    """Within it a process is ended after so many seconds; None: after none."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        _end_group(process.pid)

    timer = threading.Timer(seconds or 0.0, end)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


@contextmanager
def started(
    command: list[str], environment: dict[str, str] | None = None, limit: float | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready, and idle until its turn; one that is not so many seconds after its start has failed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
    with (
        tempfile.TemporaryFile("w+") as errors,
        running(command, stderr=errors, env=os.environ | (environment or {}), **pipes) as process,
    ):
        assert process.stdout
        with _limited(process, limit) as is_late:
            is_ready = any(line.strip() == "ready" for line in process.stdout)
        if not is_ready:
            within = f" within {limit:.0f} s" if is_late.is_set() else ""
            sys.exit(_why(f"{_name(command)} did not start{within}", errors))
        _errors[process.pid] = errors
        try:
            yield process
        finally:
            del _errors[process.pid]


def output_of(command: list[str]) -> str:
    """What a command of Python prints.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        running(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{output}{_end_of(errors)}".strip())
        return output


@contextmanager
def ended_after(seconds: float) -> Iterator[threading.Event]:
    """Within it all processes are ended after so many seconds, and none is started from then on.

    Yields:
        what says whether that happened.
    """
    timer = threading.Timer(max(0.0, seconds), end_all)
    timer.daemon = True
    timer.start()
    try:
        yield _is_over
    finally:
        timer.cancel()


def end_all() -> None:
    """End all processes that run; who waits for one of them gets an error. None is started from then on."""
    _is_over.set()
    for pid in list(_groups):
        _end_group(pid)


def begin_again() -> None:
    """Let processes be started after an end."""
    _is_over.clear()


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The project as it was at a commit, in a folder of its own."""
    git = ["git", "-C", str(Path(__file__).parent), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        subprocess.run([*git, "add", "--quiet", "--detach", str(project), commit], check=True)
        try:
            yield project
        finally:
            subprocess.run([*git, "remove", "--force", str(project)], check=True)


def run_there(project: Path, arguments: list[str]) -> None:
    """Run Python with the modules and benchmarks of a project that is checked out elsewhere."""
    paths = os.pathsep.join([str(project), str(project / "benchmarks")])
    subprocess.run([sys.executable, *arguments], check=True, cwd=project, env=os.environ | {"PYTHONPATH": paths})


def take_turn(process: subprocess.Popen[str], steps: int | str, limit: float | None = None) -> dict[str, Any]:
    """Let a side take so many optimizer steps; ``count``: one, counted. None may take more than ``limit`` seconds."""
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # it has ended: its errors say why
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    with _limited(process, limit) as is_late:
        for line in process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
    within = f", which took more than {limit:.0f} s" if is_late.is_set() else ""
    sys.exit(_why(f"{_name(process.args)} ended during its turn{within}", _errors[process.pid]))


def turns_of(
    processes: dict[str, subprocess.Popen[str]], steps: dict[str, int], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """What sides answer that take so many turns, every other round in the opposite order; the first is no measure."""
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in processes}
    for number in range(rounds + 1):
        for side in list(processes)[:: -1 if number % 2 else 1]:
            taken = take_turn(processes[side], steps[side])
            if number:
                turns[side].append(taken)
    return turns
