"""The C allocator of a rank on the CPU: memory that ZeRO stage 3 has gathered and freed goes back to the system.

glibc raises its thresholds as large blocks come and go, and then keeps freed weights in its heap; a rank that gathers
layer after layer grows until the machine has no memory left. Fixed thresholds give every block of 64 KiB or more a
mapping of its own, which ends when the block does. Fresh pages cost some time, so only those who need it ask for it.
"""

from __future__ import annotations

import ctypes
import os

THRESHOLD_BYTES = 65536
# Parameter numbers of mallopt (malloc.h), and the variables by which glibc takes the same settings at start-up.
_SETTINGS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}


def return_freed_memory() -> bool:
    """Set the thresholds for this process and the ones that it starts; what the environment says already stays.

    The environment then tells the settings, so that they are found in ``environment.json``.

    Returns:
        whether they hold; false where the C library is not glibc.
    """
    try:
        glibc = ctypes.CDLL(None)
        glibc.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError, TypeError):
        return False
    accepted = True
    for variable, parameter in _SETTINGS.items():
        if variable not in os.environ:
            accepted &= glibc.mallopt(parameter, THRESHOLD_BYTES) == 1
            os.environ[variable] = str(THRESHOLD_BYTES)
    return accepted
