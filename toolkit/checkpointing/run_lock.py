"""One command at a time in a run directory: two would write the same checkpoints and figures."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.errors import UserError

LOCK = ".lock"
PATIENCE = 30.0  # seconds in which a run that was just killed may end
_held: list[int] = []


def claim(run_dir: Path, echo: Callable[[str], None], *, patience: float | None = None) -> None:
    """Keep other commands out of a run directory, which is created, until this process ends or calls :func:`release`.

    The lock is the process's own: it ends with the process, however that ends, and its children do not inherit it.
    Where a file system has no locks, nothing is kept out.

    Raises:
        UserError: the folder cannot be created or written; another command trains there, and has not ended within
            ``patience`` seconds (None: ``PATIENCE``).
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"run.dir={run_dir}: cannot be created ({error.strerror})", "set run.dir=ANOTHER_FOLDER"
        ) from error
    _held.append(file)  # never closed before the end: closing any of a file's descriptors would end the lock
    patience = PATIENCE if patience is None else patience
    until, waits = time.monotonic() + patience, False
    while not _locked(file):
        if time.monotonic() >= until:
            raise UserError(
                f"{run_dir} is in use: another command trains there",
                "wait for it or end it, or set run.dir=ANOTHER_FOLDER",
            )
        if not waits:
            echo(f"note: {run_dir} is in use: waiting {patience:g} s for the other command to end")
            waits = True
        time.sleep(0.2)


def release() -> None:
    """Give back what this process has claimed."""
    while _held:
        os.close(_held.pop())


def _locked(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
