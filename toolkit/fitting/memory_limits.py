"""How much of the machine's memory one rank on CPUs may take: what is free now, of the machine, of its cgroups, of its
address space.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit.training.monitoring.memory_shortage import OF_PROCESS, ROOT, memory_cgroups

# The share of what is free that a rehearsal leaves: for the loader's workers, for the copy that a checkpoint is
# written from, the search of an evaluation, and other processes of the machine.
RESERVE = 0.2


@dataclass(frozen=True)
class MemoryLimit:
    """What one process may reach.

    Attributes:
        resident: bytes of main memory.
        address_space: bytes of addresses (``ulimit -v``); None = no limit.
    """

    resident: int
    address_space: int | None


def memory_limit(local_ranks: int) -> MemoryLimit:
    """What this rank may take: its share of what is free on its node now, less the reserve.

    All ranks of a node measure before any of them takes more.
    """
    own = psutil.Process().memory_info()
    free = min([psutil.virtual_memory().available, *cgroup_free()])
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    address_space = None if soft == resource.RLIM_INFINITY else own.vms + int((1 - RESERVE) * (soft - own.vms))
    return MemoryLimit(own.rss + int((1 - RESERVE) * free / local_ranks), address_space)


def cgroup_free(of_process: Path = OF_PROCESS, root: Path = ROOT) -> Iterator[int]:
    """Bytes that are left in this process's cgroup and in each of its parents that has a limit.

    Pages of files that the kernel can drop count as free.
    """
    for folder in memory_cgroups(of_process, root):
        free = _free_of(folder)
        if free is not None:
            yield free


def _free_of(folder: Path) -> int | None:
    names = ("memory.max", "memory.current") if (folder / "memory.max").exists() else _VERSION_1
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        if limit == "max" or int(limit) >= 2**60:  # version 1 writes the largest number of pages
            return None
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        return max(0, int(limit) - int(used) + droppable)
    except (OSError, ValueError):
        return None


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def peaks() -> tuple[int, int]:
    """The most main memory and the most addresses that this process has had, in bytes."""
    largest = {"VmHWM": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10, "VmPeak": 0}
    try:
        for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in largest:
                largest[name] = int(value.split()[0]) * 2**10
    except OSError:
        pass  # not Linux
    return largest["VmHWM"], largest["VmPeak"]
