"""Quick normalisation is T5's: the same values, the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5LayerNorm

from toolkit.cpu.rms_norm import CPURMSNorm, use_cpu_rms_norm

WIDTH = 16


def make(dtype: torch.dtype, quick: bool) -> T5LayerNorm:
    layer = T5LayerNorm(WIDTH)
    torch.manual_seed(0)
    layer.weight.data.normal_()
    if quick:
        use_cpu_rms_norm(layer)
        assert isinstance(layer, CPURMSNorm) and isinstance(layer, T5LayerNorm)
    return layer.to(dtype)


def trained(layer: T5LayerNorm, states: Tensor, slopes: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of the weight and of the states."""
    states = states.clone().requires_grad_()
    output = layer(states)
    output.backward(slopes.to(output.dtype))
    return [output, layer.weight.grad, states.grad]


@pytest.mark.parametrize("states_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers(dtype: torch.dtype, states_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    states, slopes = torch.randn(3, 5, WIDTH).to(states_dtype), torch.randn(3, 5, WIDTH)
    near = 1e-5 if dtype == states_dtype == torch.float32 else 0.03
    before = states.clone()
    ours, theirs = (trained(make(dtype, quick), states, slopes) for quick in (True, False))
    assert torch.equal(states, before)
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, atol=near, rtol=near)


def test_a_weight_that_is_frozen_costs_no_gradient() -> None:
    layer = make(torch.float32, quick=True)
    layer.weight.requires_grad_(False)
    states = torch.randn(2, WIDTH, requires_grad=True)
    layer(states).sum().backward()
    assert layer.weight.grad is None and states.grad is not None
