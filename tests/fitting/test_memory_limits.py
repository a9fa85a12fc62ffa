"""What a rank may take: the least of machine, cgroups and address space."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from toolkit.fitting import memory_limits
from toolkit.fitting.memory_limits import RESERVE, cgroup_free, memory_limit

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


def test_ranks_share_what_the_narrowest_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(memory_limits, "cgroup_free", lambda: iter([10 * GIB, 40 * GIB]))
    found = memory_limit(local_ranks=2)
    assert found.resident == pytest.approx(own + (1 - RESERVE) * 5 * GIB, rel=0.05)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory_limit(local_ranks=2).address_space is None
    vms = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (vms + 10 * GIB, vms + 10 * GIB))
    assert memory_limit(local_ranks=2).address_space == pytest.approx(vms + (1 - RESERVE) * 10 * GIB, rel=0.05)
