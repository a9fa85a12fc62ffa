"""The gradient watch, in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from toolkit.training.monitoring.gradient_guard import GradientGuard, TrainingStopped

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_model_whose_every_tensor_learns_passes() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    watch = GradientGuard(model)
    model(torch.ones(1, 2)).sum().backward()
    watch.check(CPU)


def test_a_tensor_that_the_forward_pass_never_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    watch = GradientGuard(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingStopped, match=r"no gradient: idle\.bias, idle\.weight"):
        watch.check(CPU)


def test_frozen_tensors_need_no_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1).requires_grad_(False)})
    watch = GradientGuard(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    watch.check(CPU)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = nn.Linear(2, 1)
    watch = GradientGuard(model)
    (model(torch.ones(1, 2)).sum() * float("inf")).backward()
    with pytest.raises(TrainingStopped, match="not finite: bias, weight"):
        watch.check(CPU)


def test_any_of_several_backward_passes_will_do() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 1), "second": nn.Linear(2, 1)})
    watch = GradientGuard(model)
    for name in ("first", "second"):
        model[name](torch.ones(1, 2)).sum().backward()
    watch.check(CPU)


def test_fp16s_first_loss_scale_may_overflow_but_every_tensor_needs_a_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    watch = GradientGuard(model["used"], may_overflow=True)
    (model["used"](torch.ones(1, 2)) * float("inf")).sum().backward()
    watch.check(CPU)
    watch = GradientGuard(model, may_overflow=True)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingStopped, match=r"no gradient: idle"):
        watch.check(CPU)
