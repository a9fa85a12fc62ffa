"""The gradient guard, on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.training.monitoring.gradient_guard import GradientGuard, TrainingStopped

CPU = torch.device("cpu")


def judge(guard: GradientGuard) -> None:
    guard.check(guard.count(CPU).item())


def test_finite_gradients_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    guard = GradientGuard(model)
    model(torch.ones(1, 2)).sum().backward()
    judge(guard)


def test_a_tensor_that_the_forward_pass_never_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    guard = GradientGuard(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingStopped, match=r"idle\.bias, idle\.weight"):
        judge(guard)


def test_frozen_tensors_need_no_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1).requires_grad_(False)})
    guard = GradientGuard(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    judge(guard)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = nn.Linear(2, 1)
    guard = GradientGuard(model)
    (model(torch.ones(1, 2)).sum() * float("inf")).backward()
    with pytest.raises(TrainingStopped, match="bias, weight"):
        judge(guard)


def test_one_of_several_backward_passes_is_enough() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 1), "second": nn.Linear(2, 1)})
    guard = GradientGuard(model)
    for name in ("first", "second"):
        model[name](torch.ones(1, 2)).sum().backward()
    judge(guard)


def test_with_fp16_gradients_may_overflow_but_not_be_missing() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    guard = GradientGuard(model["used"], may_overflow=True)
    (model["used"](torch.ones(1, 2)) * float("inf")).sum().backward()
    judge(guard)
    guard = GradientGuard(model, may_overflow=True)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingStopped, match=r"idle\.bias, idle\.weight"):
        judge(guard)


def test_a_problem_of_another_rank_stops_this_one() -> None:
    with pytest.raises(TrainingStopped, match="rank"):
        GradientGuard(nn.Linear(2, 1).requires_grad_(False)).check(1.0)
