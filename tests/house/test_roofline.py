"""What benchmarks/traffic.py counts of a kernel: FLOPs, bytes, the least time of a chip, and where it was called."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.hidden_gpus import python_path
from tests.scripts import ROOT, load_script

aten: Any = torch.ops.aten
BF16 = torch.bfloat16


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("traffic")


def moved(counting: ModuleType, operator: Any, *given: Any, **more: Any) -> float:
    """Bytes of one call."""
    return float(counting.moved_by(operator, given, more, operator(*given, **more)))


def test_an_operator_reads_what_it_gets_and_writes_what_it_makes(counting: ModuleType) -> None:
    x, narrow = torch.ones(10, 6), torch.ones(10, 6, dtype=BF16)
    assert moved(counting, aten.add.Tensor, x, narrow) == 60 * (4 + 2 + 4)
    assert moved(counting, aten.add.Tensor, x, torch.ones(6).expand(10, 6)) == 60 * 8 + 6 * 4, "repeated in the cache"
    assert moved(counting, aten.add.Tensor, x, x) == 60 * 8, "read once"
    assert moved(counting, aten.native_dropout.default, narrow, 0.5, True) == 60 * (2 + 2 + 1)


def test_what_is_only_written_is_not_read(counting: ModuleType) -> None:
    x, narrow = torch.ones(60), torch.ones(60, dtype=BF16)
    assert moved(counting, aten.add_.Tensor, x, narrow) == 60 * (4 + 2 + 4)
    assert moved(counting, aten.copy_.default, x, narrow) == 60 * (2 + 4)
    assert moved(counting, aten.zero_.default, x) == 60 * 4
    assert moved(counting, aten.mm.out, torch.ones(2, 3), torch.ones(3, 4), out=torch.empty(2, 4)) == 4 * (6 + 12 + 8)
    assert moved(counting, aten._foreach_copy_.default, [x, x[:5]], [narrow, narrow[:5]]) == 65 * (2 + 4)
    assert moved(counting, aten.new_zeros.default, x, [7]) == 7 * 4


def test_a_table_is_moved_as_far_as_it_is_looked_up(counting: ModuleType) -> None:
    table, ids = torch.ones(1000, 8), torch.tensor([3, 5])
    assert moved(counting, aten.embedding.default, table, ids) == 2 * 8 + 2 * (2 * 8 * 4)
    places, values = torch.tensor([[3], [5]]), torch.ones(2, 1)
    assert moved(counting, aten.scatter_add_.default, torch.ones(2, 1000), 1, places, values) == 2 * 8 + 2 * (2 * 4)


def test_an_optimizer_does_not_write_its_gradients(counting: ModuleType) -> None:
    weight, gradient, mean, square = (torch.ones(60) for _ in range(4))
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False}
    lists = [[weight], [gradient], [mean], [square], [], [torch.tensor(1.0)]]
    moves = moved(counting, aten._fused_adamw_.default, *lists, **settings, maximize=False)
    assert moves == pytest.approx(60 * (4 * 4 + 3 * 4), abs=8)


def test_a_kernel_takes_as_long_as_its_products_its_bytes_or_the_smallest_kernel(counting: ModuleType) -> None:
    work = counting.Work()
    work.add(989.4e12, False, 0.0, BF16)
    assert work.seconds == pytest.approx({"h100": 1.0, "h200": 1.0})
    work.add(1.0, False, 3.35e12, BF16)
    assert work.seconds == pytest.approx({"h100": 2.0, "h200": 1.0 + 3.35 / 4.8})
    before = dict(work.seconds)
    work.add(0.0, False, 4.0, torch.float32)
    assert work.seconds == pytest.approx({chip: taken + counting.SHORTEST for chip, taken in before.items()})


def test_flops_are_those_of_torch_and_a_recomputed_pass_is_not_the_models(counting: ModuleType) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    x = torch.randn(8, 16, requires_grad=True)
    with FlopCounterMode(display=False) as reference:
        layer(x).sum().backward()
    with counting.Traffic("cpu") as traffic:
        layer(x).sum().backward()
    with counting.Traffic("cpu") as again:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    flops = [sum(row["flops"] for row in each.seen()["rows"]) for each in (traffic, again)]
    assert flops[0] == traffic.seen()["model_flops"] == again.seen()["model_flops"] == reference.get_total_flops()
    assert flops[1] == pytest.approx(flops[0] * 7 / 6), "all but the last product, whose inputs are enough"


def test_a_matrix_that_a_product_is_added_to_is_copied_first(counting: ModuleType) -> None:
    """By torch, for cuBLAS adds in place; a bias is added by the product's own kernel."""
    matrix, bias, a, b = torch.randn(8, 4), torch.randn(4), torch.randn(8, 2), torch.randn(2, 4)
    with counting.Traffic("cpu") as traffic:
        torch.addmm(matrix, a, b)
        torch.addmm(bias, a, b)
    moves = {kernel: work.bytes for (_, kernel), work in traffic.work.items()}
    assert moves == {"addmm": 4 * (2 * (32 + 16 + 8) + 32 + 4), "copy_": 4 * (32 + 32)}


def test_a_gradient_is_counted_where_its_forward_pass_was_called(counting: ModuleType) -> None:
    x = torch.randn(8, requires_grad=True)
    with counting.Traffic("cpu") as traffic:
        loss = x.relu().sum()
        loss.backward()
    (place,) = {place for place, kernel in traffic.work if kernel == "threshold_backward"}
    own = "tests/house/test_roofline.py"
    assert place.startswith(own) and place.endswith("where_its_forward_pass_was_called, backward")
    assert {kernel for _, kernel in traffic.work} >= {"relu", "sum", "threshold_backward"}, "views start no kernel"
    assert "expand" not in {kernel for _, kernel in traffic.work}


def test_layers_that_were_not_compiled_are_no_figure_of_compiled_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    roofline = load_script("benchmarks/roofline.py")
    answer = {"rows": [{"place": "a", "kernel": "mm", "calls": 4, "flops": 8.0}], "model_flops": 8.0}
    monkeypatch.setattr(roofline, "started", lambda command: nullcontext())
    monkeypatch.setattr(roofline, "take_turn", lambda process, order: answer)
    assert roofline.count(tmp_path, "t5_base", "ours", ())["rows"][0]["calls"] == 1
    answer["warning"] = "layers run without compilation from here on: no compiler"
    with pytest.raises(SystemExit, match="no compiler"):
        roofline.count(tmp_path, "t5_base", "ours", ())


def test_casts_of_compiled_layers_are_compiled_where_copies_of_weights_hold_nothing() -> None:
    """traffic_side.py replaces ``Tensor.to`` of its process; a layer that broke its graph would run as written."""
    code = """
import torch, traffic_side
cast = torch.compile(lambda x: 2 * x.to(torch.float16), fullgraph=True, dynamic=True, backend="aot_eager")
states = torch.ones(3, requires_grad=True)
result = cast(states)
result.sum().backward()
print(result.dtype, *states.grad.tolist())
"""
    environment = os.environ | {"PYTHONPATH": python_path(ROOT, ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines()[-1:] == ["torch.float16 2.0 2.0 2.0"], done.stderr
