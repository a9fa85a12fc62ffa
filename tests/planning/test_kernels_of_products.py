"""Kernels that oneDNN keeps for different matrix products in bf16: counted in a trace, planned, and measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.small_runs import corpus, resolve
from tests.time_limits import limit
from toolkit.cpu.linear import has_fast_bf16
from toolkit.planning.cpu_plan import make_cpu_plan
from toolkit.planning.hardware import CPU_KERNEL
from toolkit.planning.plan import Plan
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload

__all__ = ["corpus", "resolve"]

WORKLOAD = Workload(60, 9, 60, ((1, 60),), None, "assumed")
ONE, LONGER = (2, 60, 9), (2, 80, 9)
ITEM = "kernels of matrix products"

# Products of so many shapes, none of them large; what the process has grown by with the second half of them.
SCRIPT = """
import os, sys
from toolkit.cpu.allocator import return_freed_memory
return_freed_memory()
import torch

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
before = 0
for number in range(1, 201):
    left, right = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((40, 40 + number), (40 + number, 64)))
    torch.mm(left, right)
    before = before or (anonymous() if number == 100 else 0)
print((anonymous() - before) / 100)
"""


@pytest.fixture
def planned(resolve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def plan(*, shapes: Any = (), fast: bool = True, bf16: bool = True) -> Plan:
        monkeypatch.setattr("toolkit.cpu.linear.has_fast_bf16", lambda: fast)
        run = resolve("model.tiny=true", "model.from_scratch=true", f"ds.bf16.enabled={str(bf16).lower()}")
        return make_cpu_plan(Subject.of(run.recipe, 300), run, replace(WORKLOAD, shapes=shapes), micro_batch_size=2)

    return plan


def test_each_different_product_counts_once(planned: Any) -> None:
    phases = [planned(shapes=shapes).phases for shapes in ((), (ONE,), (ONE, ONE), (ONE, LONGER))]
    none, one, same, two = (phase["step"] for phase in phases)
    assert one == same, "the products of a shape that came before have their kernels"
    first, second = ((after - before) / CPU_KERNEL for before, after in ((none, one), (one, two)))
    assert first == int(first) > 10
    assert 0 < second < first, "the decoder's own products are the same"
    assert len({phase["start"] for phase in phases}) == 1


def test_no_more_kernels_are_kept_than_the_cache_holds(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    least, few, unknown = (planned(shapes=shapes).phases["step"] for shapes in ((), (ONE, LONGER), None))
    assert few == unknown == least + 7 * CPU_KERNEL
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert planned(shapes=None).items[ITEM] == 1024 * CPU_KERNEL


def test_products_in_fp32_have_none(planned: Any) -> None:
    assert ITEM not in planned(bf16=False, shapes=None).items
    assert ITEM not in planned(shapes=None, fast=False).items


@pytest.mark.process
@pytest.mark.skipif(not has_fast_bf16(), reason="oneDNN multiplies bf16 by kernels of AVX-512 alone")
def test_a_product_of_another_shape_takes_what_is_planned() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit(60))
    assert float(done.stdout) == pytest.approx(CPU_KERNEL, rel=0.25)
