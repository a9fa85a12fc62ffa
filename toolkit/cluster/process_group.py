"""The process group: all ranks of a run, each on its device and with its share of the cores."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch

from toolkit.cluster.cores import share_of_cores, usable_cores
from toolkit.cluster.devices import barrier, check_bound, use_device
from toolkit.cluster.interfaces import name_interface
from toolkit.cluster.ops import build_missing_ops
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import join_rendezvous, leave_rendezvous, on_each_node
from toolkit.cpu.shared_memory import release_own_buffer, remove_orphaned_buffers

# A collective ends this much later than the longest permitted wait, so that the late rank reports why first.
GRACE_SECONDS = 60.0


def join_process_group(ranks: Ranks, longest_wait: float = 0.0, ops: Iterable[str] = ()) -> None:
    """Make the process group, each rank on its device; a single process becomes a group of one.

    A rank may be ``longest_wait`` seconds late for a collective, and never fewer than DeepSpeed grants. Missing ones of
    the C++ ``ops`` that the ranks load later are built here, once per node.

    Raises:
        UserError: an op could not be built.
    """
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    join_rendezvous(ranks)
    name_interface(ranks)
    device = use_device(ranks)  # not before: a GPU brings threads, and a run has forked its loader's workers by now
    names = dict.fromkeys([*([] if device.type == "cuda" else ["shm_comm"]), *ops])
    on_each_node(lambda: build_missing_ops(names, lambda line: print(f"note: {line}", file=sys.stderr, flush=True)))
    if "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # DeepSpeed uses LOCAL_RANK as the GPU's index: a rank that sees one GPU has index 0.
    number = ranks.local_rank if device.index is None else device.index
    os.environ |= {"RANK": str(ranks.rank), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks.world_size)}
    os.environ.setdefault("LOCAL_SIZE", str(ranks.local_world_size))
    if ranks.local_rank == 0:
        remove_orphaned_buffers()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it found its op
        deepspeed.init_distributed(
            verbose=False, timeout=max(default_pg_timeout, timedelta(seconds=longest_wait + GRACE_SECONDS))
        )
    check_bound()
    barrier()
    release_own_buffer(ranks.rank)


def leave_process_group() -> None:
    """Leave the group, if there is one; never after an error, because it waits for the other ranks."""
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    leave_rendezvous()


def use_threads(ranks: Ranks) -> None:
    """Divide the cores of a machine without GPUs among its ranks; all ranks call this, in the group if there is one.

    OMP_NUM_THREADS, which `deepspeed --bind_cores_to_rank` and torchrun set, takes precedence.
    """
    if torch.cuda.is_available():
        return
    from torch import distributed as dist

    own = usable_cores()
    everybody: list[Any] = [own] * ranks.world_size
    if dist.is_initialized():
        dist.all_gather_object(everybody, own)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), share_of_cores(own, everybody)))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
