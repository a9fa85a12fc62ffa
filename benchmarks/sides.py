"""Processes that train in one way each and take turns, as a benchmark starts and orders them; see ``turns.py``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_errors: dict[int, IO[str]] = {}  # of each process that is ready, what it writes as errors


def _end_of(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-3000:]


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready, and idle until its turn."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            bufsize=1, start_new_session=True,
        )  # fmt: skip
        assert process.stdin and process.stdout
        try:
            if not any(line.strip() == "ready" for line in process.stdout):
                sys.exit(f"{' '.join(command)} did not start:\n{_end_of(errors)}")
            _errors[process.pid] = errors
            yield process
        finally:
            _errors.pop(process.pid, None)
            process.stdin.close()
            os.killpg(process.pid, signal.SIGKILL)  # the loaders' workers, too
            process.wait()


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


def take_turn(process: subprocess.Popen[str], steps: int | str) -> dict[str, Any]:
    """Let a side take so many optimizer steps; ``count`` has it count one."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    sys.exit(f"{' '.join(map(str, process.args))} ended during its turn:\n{_end_of(_errors[process.pid])}")


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
