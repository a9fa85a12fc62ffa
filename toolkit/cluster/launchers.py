"""The processes of DeepSpeed's launcher above a rank, and whether they still live.

    deepspeed (the runner)  ->  deepspeed.launcher.launch, one per node  ->  the ranks

A signal that reaches only one of the two kills it and leaves the processes below it running.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def launcher_processes() -> list[psutil.Process]:
    """This rank's parent and, where DeepSpeed's launcher started it, the runner above that.

    Processes above these are ignored: the shell or script that started the runner may end at any time.
    """
    try:
        parent = psutil.Process(os.getppid())
        runner = parent.parent() if "deepspeed.launcher.launch" in parent.cmdline() else None
        return [parent, runner] if runner is not None and _is_runner(runner) else [parent]
    except psutil.Error:  # it has died already, or is another user's
        return []


def has_died(processes: list[psutil.Process]) -> bool:
    """Whether any of the processes is gone or a zombie."""
    try:
        return any(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)
    except psutil.NoSuchProcess:
        return True


def _is_runner(process: psutil.Process) -> bool:
    words = process.cmdline()
    return "deepspeed.launcher.runner" in words or any(Path(word).name == "deepspeed" for word in words[:2])
