"""Gradients of many parameters are moved together into this rank's partition; with DeepSpeed: tests/end_to_end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.scripts import load_script
from toolkit.training.optimization import joined_gradients
from toolkit.training.optimization.joined_gradients import join_gradients, joins_gradients

SHAPES: list[list[tuple[int, ...]]] = [[(3, 4), (5,), (2, 2)], [(7,)]]  # of the parameters of two groups


class Engine:
    """A DeepSpeed engine at stage 1 or 2 on one rank, as far as this module reads it."""

    def __init__(self, shapes: list[list[tuple[int, ...]]], padding: int = 3, stage: int = 1, **changed: Any) -> None:
        kind = changed.get("dtype", torch.float32)
        groups = [[nn.Parameter(torch.randn(shape, dtype=kind)) for shape in some] for some in shapes]
        sizes = [sum(weight.numel() for weight in some) + padding for some in groups]
        settings: dict[str, Any] = {
            "_coalesce_grad_reduction": False,
            "dtype": torch.float32,
            "gradient_accumulation_dtype": torch.float32,
            "master_weights_and_grads_dtype": torch.float32,
            "cpu_offload": False,
            "zenflow": False,
            "overlap_comm": False,
            "has_moe_layers": False,
            "reduce_scatter": True,
            "gradient_average": True,
            "round_robin_bit16_padding": [[0] * len(some) for some in groups],
            "round_robin_bit16_groups": groups,
            "bit16_groups": groups,
            "bit16_groups_flat": [torch.empty(size) for size in sizes],
            "params_in_partition": groups,
            "partition_size": sizes,
            "real_dp_process_group": [None] * len(groups),
            "reduce_bucket_size": 4,
            "averaged_gradients": {},
            "get_param_comm_dtype": lambda weight: torch.bfloat16,
            "_release_ipg_buffers": lambda: None,
        }
        self.optimizer: Any = SimpleNamespace(**settings | changed)
        self.weights = [weight for some in groups for weight in some]
        self.zero_optimization_stage = lambda: stage
        self.is_deepcompile_active = lambda: False

    def flush(self) -> dict[int, Any]:
        getattr(self, joined_gradients.FLUSH)(self.optimizer)
        return dict(self.optimizer.averaged_gradients)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = pytest.importorskip("deepspeed.comm")
    monkeypatch.setattr(comm, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(comm, "get_rank", lambda group=None: 0)


def test_a_partition_has_all_gradients_in_order_and_zeros_for_what_has_none(deepspeed: None) -> None:
    engine = Engine(SHAPES)
    join_gradients(engine)
    for weight in engine.weights:
        weight.grad = torch.randn(weight.shape)
    engine.weights[1].grad = None
    first, _, third, alone = (None if weight.grad is None else weight.grad.clone() for weight in engine.weights)
    assert first is not None and third is not None and alone is not None
    found = engine.flush()
    wanted = torch.cat([first.flatten(), torch.zeros(5), third.flatten(), torch.zeros(3)])
    assert torch.equal(found[0].flat_partition, wanted), "a single rank sends nothing, so nothing is rounded to bf16"
    assert torch.equal(found[1].flat_partition, torch.cat([alone, torch.zeros(3)]))
    assert all(weight.grad is None for weight in engine.weights)


def test_a_gradient_that_is_not_contiguous_keeps_its_order(deepspeed: None) -> None:
    engine = Engine([[(3, 4)]], padding=0)
    join_gradients(engine)
    engine.weights[0].grad = torch.arange(12.0).view(4, 3).t()
    assert torch.equal(engine.flush()[0].flat_partition, torch.arange(12.0).view(4, 3).t().flatten())


def test_gradients_in_bf16_are_summed_in_fp32(deepspeed: None) -> None:
    engine = Engine(SHAPES, stage=2, dtype=torch.bfloat16)
    join_gradients(engine)
    total = torch.zeros(12)
    for _ in range(9):
        for weight in engine.weights:
            weight.grad = torch.randn(weight.shape).bfloat16()
        gradient = engine.weights[0].grad
        assert gradient is not None
        total += gradient.float().flatten()
        found = engine.flush()[0]
    assert torch.equal(found.flat_partition[:12], total)
    assert torch.equal(found.flat_partition[21:], torch.zeros(3))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_norm_is_computed_of_all_parts_and_of_no_more_than_there_are_parameters(
    deepspeed: None, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """DeepSpeed takes as many norms as there are parameters, and leaves the rest out."""
    monkeypatch.setattr(joined_gradients, "NUMBERS_AT_ONCE", 4)
    engine = Engine([[(10,)] * count])
    join_gradients(engine)
    for weight in engine.weights:
        weight.grad = torch.ones(10)
    parts = engine.flush()[0]
    assert len(parts) <= count
    assert sum(float(part.square().sum()) for part, _ in zip(parts, range(count), strict=False)) == 10 * count
    assert sum(part.numel() for part in parts) == 10 * count + 3


@pytest.mark.parametrize("parameters", [4, 64])
def test_parameters_cost_two_calls_each_at_most(deepspeed: None, parameters: int) -> None:
    engine = Engine([[(3, 4)] * parameters])
    join_gradients(engine)
    for weight in engine.weights:
        weight.grad = torch.randn(weight.shape)
    with load_script("benchmarks/operator_calls.py").Calls() as calls:
        engine.flush()
    assert calls.total <= 2 * parameters + 12
    assert calls.kernels <= 4, "copies are one kernel for many"


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": torch.bfloat16},  # at stage 1
        {"dtype": torch.float16, "stage": 2},
        {"dtype": torch.bfloat16, "stage": 2, "master_weights_and_grads_dtype": torch.bfloat16},
        {"gradient_accumulation_dtype": torch.bfloat16},
        {"cpu_offload": True},
        {"overlap_comm": True},
        {"reduce_scatter": False},
        {"round_robin_bit16_padding": [[0, 2], [0]]},
    ],
)
def test_other_settings_are_left_to_deepspeed(deepspeed: None, changed: dict[str, Any]) -> None:
    engine = Engine(SHAPES, **changed)
    join_gradients(engine)
    assert not joins_gradients(engine)


def test_muon_is_left_to_deepspeed(deepspeed: None) -> None:
    engine = Engine(SHAPES)
    engine.weights[0].use_muon = True  # type: ignore[attr-defined]
    join_gradients(engine)
    assert not joins_gradients(engine)
