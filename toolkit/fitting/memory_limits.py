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
from toolkit.cpu.allocator import ADDRESSES_OF_A_KERNEL, KEPT_KERNELS
from toolkit.training.monitoring.memory_phases import RESET, RESET_RESIDENT_PEAK

# The share of what is free that a rehearsal leaves: for the loader's workers, for the copy that a checkpoint is
# written from, the search of an evaluation, and other processes of the machine.
RESERVE = 0.2
# It is never less than so many bytes a rank: what a run holds beside its model does not shrink with what is free.
LEAST_RESERVE = 1 << 28
# The same of addresses: nobody else has any of a process's own.
RESERVE_OF_ADDRESSES, LEAST_RESERVE_OF_ADDRESSES = 0.1, 1 << 27
# Addresses that a run has and its rehearsal has not: stacks of threads (of gloo, of the watch over ranks, of
# checkpoints), which the allocator gives no heaps of their own there; the buffers in shared memory by which DeepSpeed
# sums over the ranks of a node; and kernels for batches of other lengths.
THREADS, ADDRESSES_OF_A_THREAD = 12, 10 << 20
SHARED_BUFFER = 66 << 20


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
    own, addresses = psutil.Process().memory_info(), free_addresses()
    if addresses is not None:
        free = addresses - addresses_of_a_run(local_ranks)
        addresses = own.vms + less_reserve(free, RESERVE_OF_ADDRESSES, LEAST_RESERVE_OF_ADDRESSES)
    resident = own.rss + less_reserve(free_host_memory() // local_ranks, RESERVE, LEAST_RESERVE)
    return MemoryLimit(resident, addresses)


def addresses_of_a_run(local_ranks: int) -> int:
    """Bytes of addresses that each rank of a run has besides those of its rehearsal, at most."""
    kernels = KEPT_KERNELS * ADDRESSES_OF_A_KERNEL
    return THREADS * ADDRESSES_OF_A_THREAD + local_ranks * SHARED_BUFFER + kernels


def less_reserve(free: int, share: float, least: int) -> int:
    """What a rehearsal may take of so many free bytes: all but a share of them, and at least so many."""
    return max(0, min(int((1 - share) * free), free - least))


def with_reserve(size: float, share: float, least: int) -> float:
    """Bytes that must be free for a rehearsal that takes so many: the inverse of :func:`less_reserve`."""
    return max(size / (1 - share), size + least)


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
