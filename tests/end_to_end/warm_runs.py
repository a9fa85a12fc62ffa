"""Commands and runs by ``warm_launcher.py``, and how to wait for their end."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.time_limits import limit

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds, on an idle machine


@dataclass
class Run:
    """A run under the launcher.

    Attributes:
        runner: the process that a user would have started.
        folder: its run directory.
        out: the file with all that it says.
        wait: waits for the runner's exit code.
    """

    runner: psutil.Process
    folder: Path
    out: Path
    wait: Callable[[], int]

    def processes(self) -> list[psutil.Process]:
        """The runner, launch.py and the ranks, as far as they live."""
        try:
            return [self.runner, *self.runner.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> list[psutil.Process]:
        return [p for p in self.processes() if any(word.startswith("--local_rank=") for word in p.cmdline())]

    def said(self) -> str:
        return self.out.read_text(errors="replace")


class Warm:
    """Starts commands and runs by ``warm_launcher.py``.

    Args:
        folder: gets what they print.
        environment: that they have, unless a start gives them another.
        command: gives the command line of a script under so many ranks; 0 starts it without a launcher.
    """

    def __init__(self, folder: Path, environment: dict[str, str], command: Callable[..., list[str]]) -> None:
        self.folder, self.environment, self.command, self.numbers = folder, environment, command, itertools.count(1)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "end_to_end" / "warm_launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            # run_rank sets it before torch is loaded, which the warm launcher does first.
            env=environment | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
            text=True,
        )
        self.answer()

    def answer(self, **order: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        if order:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def fork(self, words: list[str], environment: dict[str, str], out: Path, err: Path, cwd: Path = ROOT) -> int:
        """Start a command line as :attr:`command` gives it; its process id."""
        launched = Path(words[0]).name == "deepspeed"
        start = [*(["-m", "deepspeed.launcher.runner"] if launched else []), *words[1:]]
        return self.answer(start=start, out=str(out), err=str(err), cwd=str(cwd), environment=environment)

    def new_file(self, kind: str) -> Path:
        """An empty file for what a command prints."""
        path = self.folder / f"{kind}_{next(self.numbers):03d}.txt"
        path.touch()
        return path

    def having(self, **variables: str) -> Warm:
        """The same, for runs that have these variables in their environment."""
        other = copy.copy(self)
        other.environment = self.environment | variables
        return other

    def start(self, folder: Path, arguments: list[str], *, ranks: int = 2, **variables: str) -> Run:
        """Start a run of so many ranks in ``folder``, with ``variables`` in its environment."""
        out = self.new_file("out")
        words = self.command("launch/train.py", *arguments, f"run.dir={folder}", ranks=ranks)
        pid = self.fork(words, self.environment | variables, out, out)
        return Run(psutil.Process(pid), folder, out, lambda: self.answer(wait=pid))

    def run(self, words: list[str], environment: dict[str, str], cwd: Path, patience: float) -> tuple[int, str, str]:
        """Run a command line to its end; its exit code, stdout and stderr."""
        out, err = self.new_file("out"), self.new_file("err")
        pid = self.fork(words, environment, out, err, cwd)
        try:
            wait_for_the_end([psutil.Process(pid)], patience)
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            raise
        return self.answer(wait=pid), out.read_text(), err.read_text()


def wait_for_the_end(processes: list[psutil.Process], patience: float = PATIENCE) -> None:
    """Wait until none of them runs; who is left without a parent may stay unburied."""
    deadline = time.monotonic() + limit(patience)
    while time.monotonic() < deadline:
        if not any(is_alive(process) for process in processes):
            return
        time.sleep(0.02)
    pytest.fail(f"still running: {[p.cmdline() for p in processes if is_alive(p)]}")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())
