"""Sums of bf16 gradients are DeepSpeed's own, by fewer calls; with DeepSpeed's engine: tests/end_to_end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.scripts import load_script
from toolkit.training.optimization.bf16_sums import join_sums

SHAPES: list[list[tuple[int, ...]]] = [[(3, 4), (5,), (2, 2)], [(7,)]]  # of the parameters of two groups
PADDING = 3  # numbers at the end of a group


def make_optimizer(shapes: list[list[tuple[int, ...]]] = SHAPES) -> Any:
    """DeepSpeed's own class on one rank, as far as it sums gradients."""
    module = pytest.importorskip("deepspeed.runtime.bf16_optimizer")
    optimizer = module.BF16_Optimizer.__new__(module.BF16_Optimizer)
    groups = [[nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in some] for some in shapes]
    sizes = [[weight.numel() for weight in some] for some in groups]
    flat = [torch.zeros(sum(some) + PADDING) for some in sizes]
    settings = {
        "bf16_groups": groups,
        "fp32_groups_gradients_flat": flat,
        "fp32_groups_actual_gradients_flat": [total[:-PADDING] for total in flat],
        "fp32_groups_gradients": [list(total[:-PADDING].split(some)) for total, some in zip(flat, sizes, strict=True)],
        "fp32_groups_has_gradients": [[False] * len(some) for some in groups],
        "non_expert_gradients": flat,
        "immediate_grad_update": False,
        "has_moe_layers": False,
        "autoep_folding_tp_group": None,
        "mpu": None,
        "optimizer": SimpleNamespace(param_groups=[{} for _ in groups]),
    }
    vars(optimizer).update(settings)
    return optimizer


def take_pass(optimizer: Any, draw: torch.Generator, without: int | None = None) -> None:
    """What one backward pass leaves; nothing for the parameter of that number."""
    optimizer.backward_prologue()
    weights = [weight for group in optimizer.bf16_groups for weight in group]
    for number, weight in enumerate(weights):
        gradient = torch.randn(weight.shape, generator=draw).bfloat16()
        if number != without:
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
    optimizer.backward_epilogue()


@pytest.mark.parametrize("passes", [1, 3])
def test_sums_are_those_of_deepspeed_in_every_step(passes: int) -> None:
    own, joined = make_optimizer(), make_optimizer()
    join_sums(SimpleNamespace(optimizer=joined))
    for step in range(3):
        for optimizer in (own, joined):
            draw = torch.Generator().manual_seed(step)
            for number in range(passes):
                # In the second step a parameter has no gradient at all, in the third one in all passes but the first.
                optimizer_without = 1 if step == 1 or (step == 2 and number == 0) else None
                take_pass(optimizer, draw, optimizer_without)
        for theirs, ours in zip(own.get_grads_for_reduction()[0], joined.get_grads_for_reduction()[0], strict=True):
            assert torch.equal(theirs, ours)
        norms = [torch.cat([part.flatten() for part in each.get_grads_for_norm()[0]]).norm() for each in (own, joined)]
        torch.testing.assert_close(norms[0], norms[1])
        for optimizer in (own, joined):
            for part in optimizer.get_grads_for_norm(for_clipping=True):
                part.mul_(0.5)
        assert all(map(torch.equal, own.fp32_groups_gradients_flat, joined.fp32_groups_gradients_flat))
        for optimizer in (own, joined):
            optimizer.clear_hp_grads()  # as at the end of a step
            optimizer.zero_grad()


def test_padding_stays_zero() -> None:
    optimizer = make_optimizer()
    join_sums(SimpleNamespace(optimizer=optimizer))
    take_pass(optimizer, torch.Generator().manual_seed(0))
    assert all(not total[-PADDING:].any() for total in optimizer.get_grads_for_reduction()[0])


@pytest.mark.parametrize("parameters", [4, 64])
def test_a_step_has_a_few_kernels_for_all_parameters(parameters: int) -> None:
    optimizer = make_optimizer([[(3, 4)] * parameters])
    join_sums(SimpleNamespace(optimizer=optimizer))
    for weight in optimizer.bf16_groups[0]:
        weight.grad = torch.ones_like(weight)
    with load_script("benchmarks/operator_calls.py").Calls() as calls:
        optimizer.backward_epilogue()
        norm, _ = optimizer.get_grads_for_norm()
        optimizer.zero_grad()
    assert (calls.kernels, len(norm)) == (1, 1)


@pytest.mark.parametrize("changed", [{"immediate_grad_update": True}, {"has_moe_layers": True}])
def test_other_settings_are_left_to_deepspeed(changed: dict[str, Any]) -> None:
    optimizer = make_optimizer()
    vars(optimizer).update(changed)
    join_sums(SimpleNamespace(optimizer=optimizer))
    assert "update_hp_grads" not in vars(optimizer)


def test_optimizers_without_such_sums_are_left_as_they_are() -> None:
    optimizer = SimpleNamespace()
    join_sums(SimpleNamespace(optimizer=optimizer))
    assert not vars(optimizer)
