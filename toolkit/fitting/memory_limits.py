"""How much of the machine's memory one rank on CPUs may take: what is free now, of the machine, of its cgroups, of its
address space.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit.cluster.host_memory import free_addresses, free_host_memory
from toolkit.training.monitoring.memory_phases import RESET, RESET_RESIDENT_PEAK

# The share of what is free that a rehearsal leaves: for the loader's workers, for the copy that a checkpoint is
# written from, the search of an evaluation, and other processes of the machine.
RESERVE = 0.2
# It is never less than so many bytes a rank: what a run holds beside its model does not shrink with what is free.
LEAST_RESERVE = 1 << 28
# Addresses of the threads that a run has and its rehearsal has not: of gloo, of the watch over ranks, of checkpoints.
# Each has a stack; the allocator gives them no heaps of their own where addresses are limited.
THREADS, ADDRESSES_OF_A_THREAD = 12, 10 << 20


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
    own, addresses, threads = psutil.Process().memory_info(), free_addresses(), THREADS * ADDRESSES_OF_A_THREAD
    return MemoryLimit(
        resident=own.rss + less_reserve(free_host_memory() // local_ranks),
        address_space=None if addresses is None else own.vms + less_reserve(addresses - threads),
    )


def less_reserve(free: int) -> int:
    """What a rehearsal may take of so many free bytes."""
    return max(0, min(int((1 - RESERVE) * free), free - LEAST_RESERVE))


def held() -> int:
    """Bytes of main memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Let :func:`peaks` count main memory from what this process has now; false where the kernel forbids it."""
    try:
        RESET.write_text(RESET_RESIDENT_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


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
