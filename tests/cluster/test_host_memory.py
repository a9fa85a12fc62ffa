"""Free memory of the host: the least of the machine, of the cgroups and of the address space."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from toolkit.cluster import host_memory
from toolkit.cluster.host_memory import cgroup_free, free_host_memory, memory_is_tight
from toolkit.planning.memory import free_memory

GIB = 2**30


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def test_every_parent_of_the_cgroup_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    write(tmp_path / "root" / "job" / "step", max="max", current=5, stat="inactive_file 1")
    write(tmp_path / "root" / "job", max=8 * GIB, current=3 * GIB, stat=f"anon 7\ninactive_file {GIB}")
    assert list(cgroup_free(tmp_path / "cgroup", tmp_path / "root")) == [6 * GIB]


def test_version_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("4:cpu,cpuacct:/\n3:memory:/job\n")
    job = tmp_path / "root" / "memory" / "job"
    write(job, limit_in_bytes=4 * GIB, usage_in_bytes=GIB, stat="total_inactive_file 0")
    write(job.parent, limit_in_bytes=2**63 - 4096, usage_in_bytes=GIB, stat="total_inactive_file 0")
    assert list(cgroup_free(tmp_path / "cgroup", tmp_path / "root")) == [3 * GIB]
    assert list(cgroup_free(tmp_path / "none", tmp_path / "root")) == []


def test_memory_is_tight_by_the_narrowest_limit_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    write(tmp_path / "job" / "step", max="max", current=5)
    write(tmp_path / "job", max=8 * GIB, current=3 * GIB)
    folders = [tmp_path / "job" / "step", tmp_path / "job", tmp_path]
    monkeypatch.setattr(host_memory, "memory_cgroups", lambda: iter(folders))
    assert [memory_is_tight(ranks) for ranks in (1, 2, 3)] == [False, False, True]
    folders.remove(tmp_path / "job")
    assert [memory_is_tight(ranks) for ranks in (3, 16, 17)] == [False, False, True]


def test_a_rank_of_an_evaluation_has_its_share_of_the_narrowest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(host_memory, "cgroup_free", lambda: iter([10 * GIB, 40 * GIB]))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_host_memory() == 10 * GIB
    assert free_memory(torch.device("cpu")) == 5 * GIB
    vms = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (vms + 3 * GIB, vms + 3 * GIB))
    assert free_memory(torch.device("cpu")) == pytest.approx(3 * GIB, rel=0.02)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (vms // 2, vms // 2))
    assert free_memory(torch.device("cpu")) == 0
