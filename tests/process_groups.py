"""Process groups for tests: of this process alone, and of two processes."""

from __future__ import annotations

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
    torch.multiprocessing.spawn(_as_rank, args=(function, port, *arguments), nprocs=2)


def _as_rank(rank: int, function: Callable[..., None], port: int, *arguments: object) -> None:
    torch.set_num_threads(1)
    use_extensions_dir()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_process_group(Ranks(rank, rank, 2, 2))
    function(rank, *arguments)
    leave_process_group()
