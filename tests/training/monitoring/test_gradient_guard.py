"""The gradient guard, in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.process_groups import group_of_one
from toolkit.training.monitoring.gradient_guard import GradientGuard, TrainingStopped

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with group_of_one(tmp_path):
        yield


def test_finite_gradients_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    guard = GradientGuard(model)
    model(torch.ones(1, 2)).sum().backward()
    guard.check(CPU)


def test_a_tensor_that_the_forward_pass_never_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    guard = GradientGuard(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingStopped, match=r"idle\.bias, idle\.weight"):
        guard.check(CPU)


def test_frozen_tensors_need_no_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1).requires_grad_(False)})
    guard = GradientGuard(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    guard.check(CPU)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = nn.Linear(2, 1)
    guard = GradientGuard(model)
    (model(torch.ones(1, 2)).sum() * float("inf")).backward()
    with pytest.raises(TrainingStopped, match="bias, weight"):
        guard.check(CPU)


def test_one_of_several_backward_passes_is_enough() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 1), "second": nn.Linear(2, 1)})
    guard = GradientGuard(model)
    for name in ("first", "second"):
        model[name](torch.ones(1, 2)).sum().backward()
    guard.check(CPU)


def test_with_fp16_gradients_may_overflow_but_not_be_missing() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    guard = GradientGuard(model["used"], may_overflow=True)
    (model["used"](torch.ones(1, 2)) * float("inf")).sum().backward()
    guard.check(CPU)
    guard = GradientGuard(model, may_overflow=True)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingStopped, match=r"idle\.bias, idle\.weight"):
        guard.check(CPU)
