"""What a rank may take: the least of machine, cgroups and address space."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import psutil
import pytest

from toolkit.cluster import host_memory
from toolkit.fitting.memory_limits import (
    LEAST_RESERVE,
    RESERVE,
    RESERVE_OF_ADDRESSES,
    addresses_of_a_run,
    less_reserve,
    memory_limit,
    with_reserve,
)

GIB = 2**30


def test_ranks_share_what_the_narrowest_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(host_memory, "cgroup_free", lambda: iter([10 * GIB, 40 * GIB]))
    found = memory_limit(local_ranks=2)
    assert found.resident == pytest.approx(own + (1 - RESERVE) * 5 * GIB, rel=0.05)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory_limit(local_ranks=2).address_space is None
    vms = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (vms + 10 * GIB, vms + 10 * GIB))
    free = 10 * GIB - addresses_of_a_run(2)
    assert memory_limit(local_ranks=2).address_space == pytest.approx(vms + (1 - RESERVE_OF_ADDRESSES) * free, rel=0.01)
    assert addresses_of_a_run(8) > addresses_of_a_run(2), "each rank maps the buffers of all of its node"


def test_of_little_memory_the_reserve_is_a_larger_share() -> None:
    reserve = (RESERVE, LEAST_RESERVE)
    assert less_reserve(10 * GIB, *reserve) == int((1 - RESERVE) * 10 * GIB)
    assert less_reserve(GIB // 2, *reserve) == GIB // 2 - LEAST_RESERVE
    assert less_reserve(LEAST_RESERVE // 2, *reserve) == 0
    for size in (GIB // 4, 20 * GIB):
        assert less_reserve(int(with_reserve(size, *reserve)), *reserve) == pytest.approx(size, abs=2)
