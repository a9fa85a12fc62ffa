"""How many of a node's cores one rank uses, on CPUs.

Ranks that each use all cores slow each other down. Which cores a process may use follows from its affinity (SLURM,
mpirun, numactl, taskset) and the quotas of its cgroups (containers, systemd), not from the machine's count.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cores:
    """The cores of a host that one process may use."""

    host: str  # name of the machine or container
    numbers: frozenset[int]  # of the cores on which it may run
    quotas: dict[str, float]  # CPU time of each of its cgroups in cores, by the cgroup's path, where it is limited


def usable_cores() -> Cores:
    """The cores that this process may use."""
    return Cores(socket.gethostname(), frozenset(os.sched_getaffinity(0)), cgroup_quotas())


def share_of_cores(own: Cores, ranks: Sequence[Cores]) -> int:
    """Threads for one rank, so that all ranks together use all cores and no core runs two threads.

    ``ranks`` are those of the run on all hosts, the rank itself (``own``) included.
    """
    here = [rank for rank in ranks if rank.host == own.host]
    # A core that three ranks may use is a third of a core to each of them.
    cores = sum(1 / sum(number in rank.numbers for rank in here) for number in own.numbers)
    shares = [quota / sum(path in rank.quotas for rank in here) for path, quota in own.quotas.items()]
    return max(1, min([math.floor(cores + 1e-6), *map(round, shares)]))


def cgroup_quotas(
    of_process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> dict[str, float]:
    """The limits, in cores, of this process's cgroup and of all its parents; empty without any."""
    quotas = {}
    try:
        lines = of_process.read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / controllers if controllers else root  # version 1 mounts each controller by itself
        group = Path(path)
        for folder in (group, *group.parents):
            quota = _quota(mounted / str(folder).lstrip("/"))
            if quota is not None:
                quotas[f"{controllers}:{folder}"] = quota
    return quotas


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError):
        return None
