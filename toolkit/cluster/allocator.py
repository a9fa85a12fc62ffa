"""The C allocator of a rank on the CPU: whether memory that was freed goes back to the system.

Under ZeRO stage 3 it must: glibc raises its thresholds as large blocks come and go, and then keeps freed weights in its
heap; a rank that gathers layer after layer grows until the machine has no memory left. Fixed thresholds give every
block of 64 KiB or more a mapping of its own, which ends when the block does.

Everywhere else it had better not: a step asks for the same large blocks as the one before, and pages that the system
takes away and hands out anew, each filled with zeros, cost time: benchmarks/training.py says how much.
"""

from __future__ import annotations

import ctypes
import os

_THRESHOLD_BYTES = 65536
# Of the same settings, the variables by which glibc takes them at start-up, and the numbers of mallopt (malloc.h).
_NUMBERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_MMAP_MAX_": -4}
_RETURN = {"MALLOC_TRIM_THRESHOLD_": _THRESHOLD_BYTES, "MALLOC_MMAP_THRESHOLD_": _THRESHOLD_BYTES}
_KEEP = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_MAX_": 0}  # never trim the heap, never map


def return_freed_memory() -> bool:
    """Make freed blocks leave this process and the ones that it starts; what the environment says already stays.

    The environment then tells the settings, so that they are found in ``environment.json``.

    Returns:
        whether the settings hold; false where the C library is not glibc.
    """
    return _set(_RETURN)


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next ones of their size; else as :func:`return_freed_memory`."""
    return _set(_KEEP)


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
