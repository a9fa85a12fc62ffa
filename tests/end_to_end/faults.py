"""Faults that a test puts into one rank; the toolkit does not know of them.

The variable FAULT names fault and rank: ``step_5 1`` is an error in the fifth step of rank 1 after its start.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "FAULT"
TIMES = "FAULT_TIME"  # names a file for the time of the fault, for benchmarks
LARGEST_FILE = 100_000  # bytes; logs and settings are smaller, states and models are larger
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")  # of version 1
LITTLE_MEMORY = 64 << 20  # bytes that a cgroup of the kernel's fault may have beyond what its process has already


class Injected(Exception):
    """Stands for an error in the code or in a library."""


def install() -> None:
    """Arm the fault that the environment asks for, if this is its rank.

    In a run with a fault, and in one with the fault ``none``, four ranks may share two cores.
    """
    what, _, rank = os.environ.get(VARIABLE, "").partition(" ")
    if what:
        os.cpu_count = lambda: 64
    if what and rank == os.environ["RANK"]:
        FAULTS[what]()


def note_time() -> None:
    """Write the time of the fault, if FAULT_TIME asks for it."""
    if place := os.environ.get(TIMES):
        Path(place).write_text(str(time.time()))


def fail() -> None:
    note_time()
    raise Injected("injected")


def run_out_of_memory() -> None:
    import torch

    note_time()
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def run_out_of_main_memory() -> None:
    raise RuntimeError(ALLOCATOR)


def be_killed_by_the_kernel() -> None:
    """Take more memory than a cgroup of this process alone may have."""
    folder = own_cgroup(os.getpid())
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(LITTLE_MEMORY))
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    held = bytearray(8 * LITTLE_MEMORY)
    for place in range(0, len(held), 4096):
        held[place] = 1
    raise Injected("the kernel has killed nothing")


def own_cgroup(pid: int) -> Path:
    return MEMORY_CGROUPS / f"toolkit-test-{pid}"


def kill() -> None:
    note_time()
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk() -> None:
    """From now on files of this process cannot grow, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def at_call(holder: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Act in place of call ``number`` of a function, or before it if ``act`` returns."""
    calls, original = 0, getattr(holder, name)

    def called(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*arguments, **settings)

    setattr(holder, name, called)


def in_step(number: int, act: Callable[[], None]) -> None:
    from toolkit.training.trainer import Trainer

    at_call(Trainer, "step", number, lambda: at_call(Trainer, "_losses", 1, act))


def in_build() -> None:
    from toolkit.training import run

    at_call(run, "build_translator", 1, fail)


def in_evaluation(act: Callable[[], None]) -> None:
    from toolkit.training import trainer

    at_call(trainer, "evaluate_split", 1, act)


def in_saving(act: Callable[[], None]) -> None:
    from toolkit.checkpointing.writer import CheckpointWriter

    at_call(CheckpointWriter, "save", 2, act)


def in_loader() -> None:
    from toolkit.batching.loader import _Padded

    at_call(_Padded, "__getitem__", 6, fail)


def in_final_scores() -> None:
    from toolkit.training import final_scores

    at_call(final_scores, "score_splits", 1, fail)


def lag() -> None:
    """See the run directory as over NFS: a path that was missing once stays missing, whichever rank creates it.

    NFS remembers it for half a minute, this for the whole run. The process sees the paths that it creates itself.
    """
    run_dir = next(Path(word.removeprefix("run.dir=")) for word in sys.argv if word.startswith("run.dir="))
    missing: set[Path] = set()

    def looks(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *arguments: Any, **settings: Any) -> Any:
            place = (
                Path(path) if isinstance(path, str | Path) and run_dir in [Path(path), *Path(path).parents] else None
            )
            if place and missing & {place, *place.parents}:
                raise FileNotFoundError(errno.ENOENT, "not there, says the cache", path)
            try:
                return function(path, *arguments, **settings)
            except FileNotFoundError:
                missing.update([place] if place else [])
                raise

        return called

    def makes(function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def called(*arguments: Any, **settings: Any) -> Any:
            value = function(*arguments, **settings)
            missing.discard(Path(arguments[which]))
            return value

        return called

    for name in ("stat", "lstat", "scandir", "listdir"):
        setattr(os, name, looks(getattr(os, name)))
    io.open = builtins.open = looks(open)  # type: ignore[assignment]
    os.mkdir = makes(os.mkdir, 0)
    os.rename, os.replace = makes(os.rename, 1), makes(os.replace, 1)


FAULTS: dict[str, Callable[[], None]] = {
    "build": in_build,
    "step_1": lambda: in_step(1, fail),
    "step_5": lambda: in_step(5, fail),
    "memory": lambda: in_step(1, run_out_of_memory),
    "main_memory": lambda: in_step(4, run_out_of_main_memory),
    "kernel": lambda: in_step(1, be_killed_by_the_kernel),
    "loader": in_loader,
    "evaluation": lambda: in_evaluation(fail),
    "saving": lambda: in_saving(fail),
    "disk": lambda: in_saving(fill_the_disk),
    "killed": lambda: in_step(3, kill),
    "final_scores": in_final_scores,
    "lag": lag,
    "none": lambda: None,
}
