"""The C allocator of a rank on the CPU: whether memory that was freed goes back to the system.

Under ZeRO stage 3 it must: glibc raises its thresholds as large blocks are freed, and then keeps freed weights in its
heap, so that a rank that gathers layer after layer fills the machine's memory. With fixed thresholds every block of
64 KiB or more is a mapping of its own, which ends when the block does.

Elsewhere it should not: each step asks for the same large blocks, and pages that the system takes back and fills with
zeros again cost time; benchmarks/training.py measures it. The kept heap has huge pages where the system offers them.

In bf16 autocast the heap keeps small blocks alone. Those of 32 MiB and more, flat weights and gradients, find no place
among the copies of single weights, and such a heap would grow with every step.

What a phase has left free goes back where the next one begins (``unused_memory.py``).

Where the addresses of a process are limited (``ulimit -v``), or a cgroup or the machine leaves a rank little memory,
freed memory goes back as well, since what a heap loses between its blocks counts against the limit, and all threads
share one heap: of each heap of its own glibc maps 64 MiB. Arrow and oneDNN are kept from holding what they do not use.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_THRESHOLD_BYTES = 65536
# Of the same settings, the variables by which glibc takes them at start-up, and the numbers of mallopt (malloc.h).
_NUMBERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_MMAP_MAX_": -4, "MALLOC_ARENA_MAX": -8}
_RETURN = {"MALLOC_TRIM_THRESHOLD_": _THRESHOLD_BYTES, "MALLOC_MMAP_THRESHOLD_": _THRESHOLD_BYTES}
_KEEP = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_MAX_": 0}  # never trim the heap, never map
_KEEP_SMALL = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": 32 << 20}  # the most that glibc allows
_FEW_HEAPS = {"MALLOC_ARENA_MAX": 1}
# Arrow's own allocator maps a GiB at once. oneDNN, and torch before it, keep the compiled kernels of 1,024 matrix
# products each, 1.5 MiB of addresses a product and half as much memory: with batches of all lengths they grow long
# after a rehearsal.
KEPT_KERNELS, ADDRESSES_OF_A_KERNEL = 64, 3 << 19
_CAPACITY, _LIBRARYS_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024
_MADV_HUGEPAGE = 14  # of madvise, sys/mman.h


def spare_memory(*, tight: bool) -> None:
    """Where memory is ``tight``, or addresses are limited (``ulimit -v``), let freed memory go back, and libraries hold
    no more than they use: in this process, before it has threads, tables and matrix products, and in those it starts.
    """
    if tight or _addresses_are_limited():
        _set(_FEW_HEAPS | _RETURN)
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        keep_few_kernels()


def keep_few_kernels() -> None:
    """Have oneDNN and torch keep few compiled kernels, in a process that has multiplied nothing and those it starts.

    They outlive the batches that they were made for, and a heap that keeps freed memory cannot join the blocks between.
    """
    for variable in (_CAPACITY, "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KEPT_KERNELS))


def return_freed_memory() -> bool:
    """Return freed blocks of this process, and of those that it starts, to the system; variables that are set stay.

    The settings are put into the environment, so that ``environment.json`` holds them.

    Returns:
        whether the settings hold; false where the C library is not glibc.
    """
    spare_memory(tight=False)
    return _set(_RETURN)


def keep_freed_memory(*, maps_large: bool = False) -> bool:
    """Keep freed blocks for the next ones of their size, unless :func:`spare_memory` decided that they go back, or
    addresses are limited; else as :func:`return_freed_memory`.

    Args:
        maps_large: whether blocks of 32 MiB and more go back all the same.
    """
    if _addresses_are_limited() or os.environ.get("MALLOC_MMAP_THRESHOLD_") == str(_THRESHOLD_BYTES):
        return return_freed_memory()
    held = _set(_KEEP_SMALL if maps_large else _KEEP)
    if held:
        grow_heap()
    return held


def keeps_memory() -> bool:
    """Whether this process keeps freed memory, by :func:`keep_freed_memory`."""
    return os.environ.get("MALLOC_TRIM_THRESHOLD_") == "-1"


def most_kernels() -> int:
    """How many matrix products oneDNN keeps the kernels of, in this process."""
    return int(os.environ.get(_CAPACITY, _LIBRARYS_CAPACITY))


def _addresses_are_limited() -> bool:
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def give_back_heap() -> None:
    """Return all free pages of this process to the system, those within the heap as well; where glibc is not, none."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
    if keeps_memory():
        grow_heap()


def grow_heap() -> None:
    """Give a heap that keeps all blocks addresses for half of the machine's memory, for huge pages to fill.

    A heap that keeps small blocks alone must stay small: glibc maps a block only where the heap's end has no place.
    glibc asks for huge pages by itself only where GLIBC_TUNABLES says so as the process starts.
    """
    if os.environ.get("MALLOC_MMAP_MAX_") != "0" or os.environ.get("MALLOC_TRIM_THRESHOLD_") != "-1":
        return
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        return  # the system counts addresses as memory, and would have too little left for the other ranks
    glibc = ctypes.CDLL(None)
    glibc.malloc.restype = ctypes.c_void_p
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    block = glibc.malloc(ctypes.c_size_t(size))
    if block:
        start = -(-block // page) * page
        glibc.madvise(ctypes.c_void_p(start), ctypes.c_size_t((block + size - start) // page * page), _MADV_HUGEPAGE)
        glibc.free(ctypes.c_void_p(block))  # nothing was written: the heap keeps the addresses, not the memory


def _set(settings: dict[str, int]) -> bool:
    try:
        glibc = ctypes.CDLL(None)
        glibc.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError, TypeError):
        return False
    accepted = True
    for variable, value in settings.items():
        if variable not in os.environ:
            accepted &= glibc.mallopt(_NUMBERS[variable], value) == 1
            os.environ[variable] = str(value)
    return accepted
