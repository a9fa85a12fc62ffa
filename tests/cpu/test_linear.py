"""Without fast bf16, linear layers train by products in fp32, and evaluate as torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.cpu import linear
from toolkit.cpu.linear import Fp32Linear, use_fp32_linear


class Products(TorchDispatchMode):
    """Collects the types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(function):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def make(monkeypatch: pytest.MonkeyPatch, *, fast: bool, bias: bool = True) -> nn.Module:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: fast)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias), nn.GELU(), nn.Linear(16, 8, bias=bias)).to(torch.bfloat16)
    use_fp32_linear(model)
    return model


def gradients(model: nn.Module, states: Tensor) -> list[Tensor]:
    states = states.clone().requires_grad_()
    model.zero_grad()
    (model(states).float() ** 2).sum().backward()
    return [states.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_training_multiplies_in_fp32_and_learns_in_bf16(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    slow, fast = make(monkeypatch, fast=False, bias=bias), make(monkeypatch, fast=True, bias=bias)
    assert [type(layer) for layer in slow][::2] == [Fp32Linear] * 2
    assert [type(layer) for layer in fast][::2] == [nn.Linear] * 2
    states = torch.randn(3, 5, 24).to(torch.bfloat16)
    with Products() as products:
        ours = gradients(slow, states)
    assert products.dtypes == {torch.float32}
    for gradient, reference in zip(ours, gradients(fast, states), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - reference).norm() <= 0.01 * reference.norm()


def test_only_what_is_needed_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(monkeypatch, fast=False)
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 24).to(torch.bfloat16)).sum().backward()
    assert model[0].weight.grad is None and model[0].bias.grad is not None


def test_evaluation_is_bitwise_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(2, 5, 24).to(torch.bfloat16)
    slow, fast = make(monkeypatch, fast=False).eval(), make(monkeypatch, fast=True).eval()
    assert torch.equal(slow(states), fast(states))


def test_other_types_are_computed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = make(monkeypatch, fast=False).float(), make(monkeypatch, fast=True).float()
    states = torch.randn(2, 5, 24)
    for ours, reference in zip(gradients(slow, states), gradients(fast, states), strict=True):
        assert torch.equal(ours, reference)
