"""Gradients at ZeRO stage 0, which the training loop clips, and steps without a finite one."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from tests.scripts import load_script
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.engine import clip_gradients, gradient_norm, take_step


def engine_with_gradients(scale: float, clipping: float = 0.0) -> Any:
    """A model with gradients of this scale, one of its tensors without any, and what its engine clips to itself."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    for parameter in list(module.parameters())[:-1]:
        parameter.grad = scale * torch.randn_like(parameter)
    return SimpleNamespace(module=module, gradient_clipping=lambda: clipping)


def gradients(engine: Any) -> list[torch.Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize("scale", [10.0, 0.5, 0.01])
@pytest.mark.parametrize("largest", [1.0, 0.25])
def test_gradients_are_clipped_as_torch_clips_them(scale: float, largest: float) -> None:
    ours, torchs = engine_with_gradients(scale), engine_with_gradients(scale)
    norm = float(gradient_norm(ours.module.parameters()))
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(torchs.module.parameters(), largest)))
    clip_gradients(ours, ours.module.parameters(), norm, largest)
    torch.testing.assert_close(gradients(ours), gradients(torchs), rtol=1e-6, atol=0)
    assert float(gradient_norm(ours.module.parameters())) == pytest.approx(min(norm, largest), rel=1e-5)


@pytest.mark.parametrize(("norm", "largest", "clipping"), [(100.0, 0.0, 0.0), (None, 1.0, 0.0), (100.0, 1.0, 1.0)])
def test_gradients_stay_without_clipping_without_a_norm_and_where_deepspeed_clips(
    norm: float | None, largest: float, clipping: float
) -> None:
    engine = engine_with_gradients(100.0, clipping)
    before = gradients(engine)
    clip_gradients(engine, engine.module.parameters(), norm, largest)
    torch.testing.assert_close(gradients(engine), before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [2.0, math.inf, math.nan, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("applies", [True, False])
def test_a_step_is_left_to_deepspeed_where_that_can_skip_it(
    resolve: Callable[..., ResolvedRun], norm: float | None, precision: str, applies: bool
) -> None:
    """Where the loop clips, DeepSpeed has torch's optimizer, which would step."""
    resolved, calls, engine = resolve(), MagicMock(), engine_with_gradients(1.0)
    resolved.deepspeed["zero_optimization"] = {"stage": 0}
    resolved.deepspeed["bf16"] = {"enabled": precision == "bf16"}
    calls.was_step_applied.return_value = applies
    calls.gradient_clipping.return_value, calls.global_steps, calls.skipped_steps = 1.0, 5, 0
    is_finite = norm is None or math.isfinite(norm)
    assert take_step(calls, resolved, engine.module.parameters(), norm) is (is_finite and applies)
    is_ours = precision == "fp32" and not is_finite
    assert (calls.step.called, calls.zero_grad.called) == (not is_ours, is_ours)
    assert (calls.global_steps, calls.skipped_steps) == ((6, 1) if is_ours else (5, 0)), "DeepSpeed counts its own"


def test_clipping_takes_one_call_and_no_copy() -> None:
    engine = engine_with_gradients(100.0)
    with load_script("benchmarks/operator_calls.py").Calls() as calls:
        clip_gradients(engine, engine.module.parameters(), 100.0, 1.0)
    assert calls.operators == {"aten._foreach_mul_.Scalar": 1}
