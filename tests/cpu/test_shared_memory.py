"""No shared-memory buffer outlives a run: its names go at start-up, and the next run removes what was left behind."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.time_limits import limit
from toolkit.cpu.shared_memory import (
    GRACE_SECONDS,
    PREFIX,
    SHARED_MEMORY,
    own_buffer,
    release_own_buffer,
    remove_orphaned_buffers,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm and /proc are Linux's")

# Two ranks start as DeepSpeed starts them, give their names back, and continue to reduce through the unnamed memory.
RANK_PROGRAM = """
import sys
from toolkit.cluster.ops import use_extensions_dir
use_extensions_dir()
import deepspeed, torch
from toolkit.cluster.ranks import read_ranks
from toolkit.cpu.shared_memory import own_buffer, release_own_buffer
ranks = read_ranks()
deepspeed.init_distributed("gloo", verbose=False)
torch.distributed.barrier()
found = own_buffer(ranks.rank).exists()
torch.distributed.barrier()
release_own_buffer(ranks.rank)
value = torch.full((1000,), float(ranks.rank + 1))
deepspeed.comm.all_reduce(value)
print("RESULT", found, own_buffer(ranks.rank).exists(), value[0].item())
"""


def old_buffer(folder: Path, port: int, uid: int | None = None) -> Path:
    path = folder / f"{PREFIX}_{os.getuid() if uid is None else uid}_127.0.0.1_{port}_0"
    path.write_bytes(b"\0" * 4096)
    then = time.time() - GRACE_SECONDS - 60
    os.utime(path, (then, then))
    return path


@linux
def test_buffers_that_nobody_maps_are_removed_and_only_those(tmp_path):
    orphan = old_buffer(tmp_path, 1)
    of_another_user = old_buffer(tmp_path, 2, uid=os.getuid() + 1)
    in_the_making = old_buffer(tmp_path, 3)
    os.utime(in_the_making)
    unrelated = tmp_path / "psm_1234"
    unrelated.write_bytes(b"x")
    in_use = old_buffer(tmp_path, 4)
    with in_use.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        remove_orphaned_buffers(tmp_path)
        assert in_use.exists()
    assert not orphan.exists()
    assert of_another_user.exists() and in_the_making.exists() and unrelated.exists()
    remove_orphaned_buffers(tmp_path)  # its last user is gone
    assert not in_use.exists()


def test_releasing_a_buffer_that_is_not_there_is_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    release_own_buffer(0, tmp_path)
    own_buffer(0, tmp_path).write_bytes(b"x")
    release_own_buffer(0, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@linux
def test_two_deepspeed_ranks_reduce_through_buffers_that_have_no_name(free_port):
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=limit(400))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for output in outputs:
        assert "RESULT True False 3.0" in output, output
    assert not list(SHARED_MEMORY.glob(f"{PREFIX}_*_{free_port}_*"))
