"""Commands without their start-up time: a process that has imported everything forks where it would exec.

    this process  ->  deepspeed (the runner)  ->  deepspeed.launcher.launch  ->  the ranks of launch/train.py

The processes, their groups, parents, signals and exit codes are those of the real launcher, whose code runs unchanged;
so is all that the ranks do. Only ``exec`` and the imports after it are spared, thirteen seconds of every start of two
ranks and six of a script without a launcher.

It reads commands on stdin, one JSON object a line, and answers each with a number:
``{"start": [argument of python, ...], "out": file, "err": file, "cwd": folder, "environment": {...}}`` with the process
id, ``{"wait": id}`` with the exit code, negative for a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import faults  # it lies beside this script

from tests.forks import end_with, import_all, write_to
from tests.hidden_gpus import hide_gpus

ROOM_FOR_A_COMMAND_LINE = 16384
RealPopen = subprocess.Popen
LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed.launcher.runner")


class ForkingPopen(RealPopen):  # type: ignore[type-arg]
    """Starts Python by a fork of this one, everything else as ever."""

    def __init__(self, args: Any, env: dict[str, str] | None = None, **options: Any) -> None:
        self._own_environment = env
        super().__init__(args, env=env, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if not isinstance(args, list) or args[0] != sys.executable:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        self.pid = os.fork()
        if self.pid == 0:
            run(args, self._own_environment)
        self._child_created = True


def run(command: list[str], environment: dict[str, str] | None) -> NoReturn:
    """Be the process that ``command`` would have started; in a fork."""
    show_as(command)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        hide_gpus()
    tempfile.tempdir = None  # its folder is that of TMPDIR, of this environment
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [word for word in command[1:] if word != "-u"]
    end_with(lambda: run_module(words[1:]) if words[0] == "-m" else run_script(words))


def run_module(words: list[str]) -> None:
    """``python -m`` with these arguments: one of DeepSpeed's two launchers."""
    from deepspeed.launcher import launch, runner

    sys.argv = words
    {"deepspeed.launcher.runner": runner.main, "deepspeed.launcher.launch": launch.main}[words[0]]()


def run_script(words: list[str]) -> None:
    """A script with its arguments: a command, or a rank, which may have a fault."""
    subprocess.Popen = RealPopen  # type: ignore[misc]
    sys.argv = words
    faults.install()
    runpy.run_path(words[0], run_name="__main__")


def show_as(command: list[str]) -> None:
    """Let /proc show this command line, by which ranks know their launchers."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, the 48th and 49th of all fields
    text = "\0".join(command).encode()[: end - start - 1]
    ctypes.memmove(start, text + b"\0" * (end - start - len(text)), end - start)


def import_everything() -> None:
    """Import what the processes need; none of it may start a thread, which no fork would have."""
    import_all(LAUNCHERS)
    threads = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")}
    others = threads - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # jemalloc expects forks
    assert not others, f"a process with threads must not be forked: {others}"


def main() -> None:
    if len(sys.argv) == 1:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "." * ROOM_FOR_A_COMMAND_LINE])
    with contextlib.redirect_stdout(sys.stderr):
        import_everything()
    gc.freeze()  # the children share the pages
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            os.setsid()
            write_to(order["out"], order["err"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(order["cwd"])
            run([sys.executable, *order["start"]], order["environment"])
        print(child, flush=True)


if __name__ == "__main__":
    main()
