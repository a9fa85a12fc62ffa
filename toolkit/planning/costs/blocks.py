"""What torch's allocator takes of a GPU for tensors that stay: it leaves nothing of a block that is too small to serve.

Read off ``CUDACachingAllocator.cpp`` of torch 2.11, whose figures are below.
"""

from __future__ import annotations

from collections.abc import Iterable

ROUNDED = 512  # bytes of which every block is a multiple
SMALLEST = 2**20  # of a large block; what remains of one is only split off where it is larger
SEGMENT = 20 * 2**20  # of which tensors of less than `ALONE` bytes are parts
ALONE = 10 * 2**20
MULTIPLE = 2 * 2**20  # of which the segments of larger tensors are


def in_blocks(sizes: Iterable[float]) -> float:
    """Bytes that torch says are allocated for tensors of so many bytes each, made one after the other."""
    total, free = 0.0, list[float]()
    for size in sizes:
        size = -(-int(size) // ROUNDED) * ROUNDED
        if size <= SMALLEST:  # in segments of their own, of which all is used
            total += size
            continue
        fitting = [place for place, room in enumerate(free) if room >= size]
        if not fitting:
            free.append(SEGMENT if size < ALONE else -(-size // MULTIPLE) * MULTIPLE)
            fitting = [len(free) - 1]
        room = free.pop(min(fitting, key=free.__getitem__))
        taken = size if room - size > SMALLEST else room
        total += taken
        if room > taken:
            free.append(room - taken)
    return total
