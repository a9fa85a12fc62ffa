"""The hardware under a run, in words that differ from machine to machine."""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.cluster.cores import usable_cores
from toolkit.cluster.environment import cpu_name
from toolkit.cluster.host_memory import host_memory
from toolkit.cluster.ranks import Ranks
from toolkit.planning.hardware import CUDA_CONTEXT, NCCL_BUFFERS

GIB = 2**30
# The share of a GPU that stays free: buffers of NCCL, which the rehearsal has none of, and blocks between tensors.
GPU_RESERVE = 0.05


@dataclass(frozen=True)
class Card:
    """A GPU of this node; ``free`` counts what other processes leave, a context of CUDA included, in bytes."""

    name: str
    memory: int
    free: int


def cards() -> list[Card]:
    """The GPUs of this node, as another process sees them: this one has yet to fork, which CUDA does not survive."""
    if not torch.cuda.device_count():
        return []
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_look, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        found: list[Card] = ours.recv()
    finally:
        process.join()
    return found


def _look(connection: Any) -> None:
    found = []
    for number in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(number)
        free += CUDA_CONTEXT  # that of this process, which ends
        found.append(Card(torch.cuda.get_device_name(number), memory, min(free, memory)))
    connection.send(found)


def describe(ranks: Ranks, found: list[Card]) -> str:
    """The hardware of the first node and the number of ranks; of CPUs with the limits of a container or a shell."""
    count = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
    here = count if ranks.world_size == ranks.local_world_size else f"{count}, {ranks.local_world_size} on a node"
    if found:
        kinds = sorted({f"{card.name}, {card.memory / GIB:.1f} GiB" for card in found})
        return f"{here}: {'; '.join(kinds)}"
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    space = "" if soft == resource.RLIM_INFINITY else f", at most {soft / GIB:.1f} GiB of addresses"
    own = usable_cores()
    quota = "".join(f", {cores:g} of them by quota" for cores in sorted(set(own.quotas.values())))
    return f"{here}: {cpu_name()}, {len(own.numbers)} cores{quota}, {host_memory() / GIB:.1f} GiB{space}"


def leave_reserve(ranks: Ranks) -> int:
    """Let torch's allocator run out of memory at what other processes on the card leave free, less the reserve.

    Returns:
        bytes that the allocator may have.
    """
    free, total = torch.cuda.mem_get_info()
    kept = GPU_RESERVE * total + (NCCL_BUFFERS if ranks.world_size > 1 else 0)
    room = max(0, int(free - kept))
    torch.cuda.set_per_process_memory_fraction(room / total)
    return room


def room_for_tensors(card: Card, world_size: int) -> int:
    """Bytes that torch may have of a card, as :func:`leave_reserve` counts, before a process has its context there."""
    return int(card.free - GPU_RESERVE * card.memory - CUDA_CONTEXT - (NCCL_BUFFERS if world_size > 1 else 0))
