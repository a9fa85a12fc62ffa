"""Runs under ``warm_launcher.py``, and how to wait for their end."""

from __future__ import annotations

import json
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
    """Starts runs by ``warm_launcher.py``."""

    def __init__(self, folder: Path, environment: dict[str, str], command: Callable[..., list[str]]) -> None:
        self.folder, self.environment, self.command, self.count = folder, environment, command, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "end_to_end" / "warm_launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        self.answer()

    def answer(self, **order: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        if order:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder: Path, arguments: list[str], *, ranks: int = 2, **variables: str) -> Run:
        """Start a run of so many ranks in ``folder``, with ``variables`` in its environment."""
        self.count += 1
        out = self.folder / f"out_{self.count:02d}.txt"
        out.touch()
        words = self.command("launch/train.py", *arguments, f"run.dir={folder}", ranks=ranks)[1:]
        pid = self.answer(start=words, out=str(out), environment=self.environment | variables)
        return Run(psutil.Process(pid), folder, out, lambda: self.answer(wait=pid))


def wait_for_the_end(processes: list[psutil.Process]) -> None:
    """Wait until none of them runs; who is left without a parent may stay unburied."""
    deadline = time.monotonic() + limit(PATIENCE)
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
