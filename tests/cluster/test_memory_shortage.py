"""What counts as a shortage of memory, and where the kernel counts the processes that it killed for it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from toolkit.cluster import memory_shortage
from toolkit.cluster.memory_shortage import in_short, is_out_of_memory, oom_kills
from toolkit.errors import UserError

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB of which 1 GiB is free. Of the allocated memory"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_what_allocators_say_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), ValueError("out of memory"), KeyError(7)]
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_an_error_of_the_user_is_none() -> None:
    assert not is_out_of_memory(UserError("a card is out of memory"))


@pytest.mark.parametrize("said", ["can't start new thread", "could not create a primitive"])
def test_what_else_is_said_where_addresses_are_limited(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(said)
    assert not is_out_of_memory(error)
    monkeypatch.setattr(memory_shortage, "free_addresses", lambda: 2**20)
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_statistics_of_the_allocator_are_left_out() -> None:
    assert in_short(torch.OutOfMemoryError(CUDA)).endswith("1 GiB is free")
    assert in_short(MemoryError()) == "MemoryError"


def test_kills_are_counted_in_every_cgroup_and_in_the_machine(tmp_path: Path) -> None:
    process, root, machine = tmp_path / "cgroup", tmp_path / "root", tmp_path / "vmstat"

    def kills() -> int:
        return oom_kills(process, root, machine)

    assert kills() == 0, "a system without these files"
    process.write_text("0::/job/step\n4:memory:/job\n")
    machine.write_text("nr_free_pages 7\noom_kill 0\n")
    before = kills()
    for file, text in {
        root / "job" / "memory.events": "low 0\noom 3\noom_kill 2\n",
        root / "memory" / "job" / "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        machine: "nr_free_pages 7\noom_kill 5\n",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        assert kills() > before
        before = kills()
    assert kills() == 8
