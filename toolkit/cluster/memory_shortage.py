"""Whether memory was short: what errors say, and what the kernel has counted."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from toolkit.cluster.host_memory import OF_PROCESS, ROOT, free_addresses, memory_cgroups
from toolkit.errors import OutOfMemory, explained, first_line

OF_MACHINE = Path("/proc/vmstat")
OF_BOOT = Path("/proc/sys/kernel/random/boot_id")
OF_CGROUP = ("memory.events", "memory.oom_control")  # of version 2 and 1
COUNTER = "oom_kill"
# Of what torch, CUDA, cuBLAS and C++ say, in lower case; not all of their errors have a class of their own.
WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
# What Python says of a thread's stack, and oneDNN of the code that it writes, where no addresses are left; either may
# have other reasons.
WORDS_OF_ADDRESSES = ("can't start new thread", "could not create a primitive")
# What torch's loader says of a process that SIGKILL ended.
LOADER_KILLED = "killed by signal: Killed"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    words = WORDS if free_addresses() is None else (*WORDS, *WORDS_OF_ADDRESSES)
    return isinstance(error, RuntimeError) and explained(error) is None and any(word in said for word in words)


@contextmanager
def explained_shortage(what: str, hint: str) -> Iterator[None]:
    """Within it an error that says that memory was short is the user's: what it was for, and a hint.

    Raises:
        OutOfMemory: in its place.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what} ran out of memory: {in_short(error)}", hint) from error


def in_short(error: BaseException) -> str:
    """What such an error says, without the allocator's statistics."""
    return ". ".join(first_line(error).split(". ")[:3])


def oom_kills(of_process: Path = OF_PROCESS, root: Path = ROOT, of_machine: Path = OF_MACHINE) -> int:
    """How many processes the kernel has killed because memory was short: a number that grows with each.

    Of the cgroups of this process and of the machine: a container may not see the latter, and a cgroup not its
    siblings.
    """
    return sum(oom_kills_by_place(of_process, root, of_machine).values())


def oom_kills_by_place(
    of_process: Path = OF_PROCESS, root: Path = ROOT, of_machine: Path = OF_MACHINE
) -> dict[str, int]:
    """The same by ``cgroups``, where a new container begins at 0, and ``machine``, where the next boot does."""
    files = [folder / name for folder in memory_cgroups(of_process, root) for name in OF_CGROUP]
    return {"cgroups": sum(map(_count_in, files)), "machine": _count_in(of_machine)}


def boot_id(file: Path = OF_BOOT) -> str:
    """Names a boot of this machine; empty where the system does not say."""
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _count_in(file: Path) -> int:
    try:
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts[COUNTER])
    except (OSError, ValueError, KeyError):
        return 0
