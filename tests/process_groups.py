"""Process groups for tests: of this process alone, and of two processes, forked from one that has imported a lot."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import Ranks

# What both processes import; tests that need two share the process that has done so.
IMPORTED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.t5.modeling_t5",
    "toolkit.decoding.decode_split",
    "tests.process_groups",
)


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """Within it this process is the one rank of a process group; ``folder`` gets its store."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def run_in_two_processes(function: Callable[..., None], *arguments: object) -> None:
    """Run a module-level function as rank 0 and 1 of a real process group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    torch.multiprocessing.start_processes(
        _as_rank, args=(function, port, *arguments), nprocs=2, start_method="forkserver"
    )


def _as_rank(rank: int, function: Callable[..., None], port: int, *arguments: object) -> None:
    torch.set_num_threads(1)
    use_extensions_dir()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_process_group(Ranks(rank, rank, 2, 2))
    function(rank, *arguments)
    leave_process_group()
