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
from typing import Any


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
                errors.seek(0)
                sys.exit(f"{' '.join(command)} did not start:\n{errors.read()[-3000:]}")
            yield process
        finally:
            process.stdin.close()
            os.killpg(process.pid, signal.SIGKILL)  # the loaders' workers, too
            process.wait()


def take_turn(process: subprocess.Popen[str], steps: int | str) -> dict[str, Any]:
    """Let a side take so many optimizer steps; ``count`` has it count one."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    sys.exit(f"{' '.join(map(str, process.args))} ended during its turn")
