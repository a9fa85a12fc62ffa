"""How much main memory a process may still take: of the machine, of its cgroups, of its address space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

TIGHT = 4 << 30  # bytes a rank: less, and what libraries keep besides a model decides what fits

OF_PROCESS = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def free_host_memory() -> int:
    """Bytes that the processes of this cgroup may still take together: a container's are fewer than the machine's."""
    return min([psutil.virtual_memory().available, *cgroup_free()])


def host_memory() -> int:
    """Bytes that the processes of this cgroup may have together: the machine's memory, or the narrowest limit."""
    limits = filter(None, map(_limit_of, memory_cgroups()))
    return min([psutil.virtual_memory().total, *limits])


def memory_is_tight(local_ranks: int) -> bool:
    """Whether the memory of the machine, or the limit of a cgroup, is less than 4 GiB for each rank of this node."""
    return host_memory() < local_ranks * TIGHT


def free_addresses() -> int | None:
    """Bytes that this process may still map (``ulimit -v``); None = no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else max(0, soft - psutil.Process().memory_info().vms)


def cgroup_free(of_process: Path = OF_PROCESS, root: Path = ROOT) -> Iterator[int]:
    """Bytes that are left in this process's cgroup and in each of its parents that has a limit.

    Pages of files that the kernel can drop count as free.
    """
    for folder in memory_cgroups(of_process, root):
        free = _free_of(folder)
        if free is not None:
            yield free


def memory_cgroups(of_process: Path = OF_PROCESS, root: Path = ROOT) -> Iterator[Path]:
    """Folders of this process's memory cgroup and of each of its parents, of both versions."""
    try:
        lines = of_process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / "memory" if controllers else root  # version 1 mounts each controller by itself
        group = Path(path)
        for folder in (group, *group.parents):
            yield mounted / str(folder).lstrip("/")


def _limit_of(folder: Path) -> int | None:
    limit, _ = _files_of(folder)
    try:
        value = (folder / limit).read_text().strip()
        return None if value == "max" or int(value) >= 2**60 else int(value)  # version 1: the largest number of pages
    except (OSError, ValueError):
        return None


def _free_of(folder: Path) -> int | None:
    limit = _limit_of(folder)
    if limit is None:
        return None
    _, usage = _files_of(folder)
    try:
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        return max(0, limit - used + droppable)
    except (OSError, ValueError):
        return None


def _files_of(folder: Path) -> tuple[str, str]:
    return ("memory.max", "memory.current") if (folder / "memory.max").exists() else _VERSION_1
