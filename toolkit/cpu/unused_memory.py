"""Memory that a rank on the CPU holds and does not use: free blocks of its heap, and pages of the corpus's tables.

Where a heap keeps what was freed (``allocator.py``), a phase would begin with all that the one before it took. And each
page of a table that was read counts as the process's, although the system may drop it at any time.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit.cpu.allocator import give_back_heap
from toolkit.cpu.switch import uses_cpu_code

SHARE = 0.01  # of a rank's time that tables may cost
MAPPINGS = Path("/proc/self/maps")
TABLE = ".arrow"


@dataclass
class UnusedMemory:
    """Gives a process's unused memory back to the system; on a GPU nothing is done."""

    _due: float = 0.0

    def give_back(self) -> None:
        """Give all of it back. What the next step needs again costs page faults."""
        if uses_cpu_code():
            give_back_heap()
            _free_tables()

    def after_step(self) -> None:
        """Give pages of tables back, as often as costs a hundredth of the time."""
        began = time.perf_counter()
        if uses_cpu_code() and began >= self._due:
            _free_tables()
            ended = time.perf_counter()
            self._due = ended + (ended - began) / SHARE


def _free_tables() -> None:
    """Forget the pages of tables that were read. They stay in the system's cache, as long as it has the memory."""
    try:
        lines = MAPPINGS.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        addresses, rights, *_ = line.split(maxsplit=2)
        # What was never written is read from the file again.
        if line.endswith(TABLE) and "w" not in rights:
            first, last = (int(address, 16) for address in addresses.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
