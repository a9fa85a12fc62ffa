"""A frozen backbone: no weight and no moment changes, and it starts as in the first step when it thaws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from toolkit.training.engine import set_learning_rate
from toolkit.training.optimization.freezing import BackboneFreeze
from toolkit.training.optimization.schedules import backbone_factor


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"pose_encoder": nn.Linear(3, 4), "backbone": nn.Linear(4, 2)})


def engine_of(module: nn.ModuleDict) -> Any:
    groups = [{"params": list(module[name].parameters()), "name": name, "lr": 0.1} for name in module]
    groups[0]["name"] = "fresh"
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    return SimpleNamespace(module=module, optimizer=optimizer, basic_optimizer=optimizer)


def train(module: nn.ModuleDict, engine: Any, steps: int, factor: float) -> None:
    for step in range(steps):
        set_learning_rate(engine, [("fresh", 0.1), ("backbone", 0.1)], 1.0, factor)
        torch.manual_seed(step)
        module["backbone"](module["pose_encoder"](torch.randn(5, 3))).square().sum().backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()


def test_nothing_of_a_frozen_backbone_changes_and_the_rest_trains() -> None:
    module = model()
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    engine = engine_of(module)
    BackboneFreeze(module)
    train(module, engine, 4, factor=0.0)
    for name, weight in module.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("backbone"), name
        state = engine.optimizer.state[weight]
        assert bool(state["exp_avg"].any()) != name.startswith("backbone"), name


def test_a_thawed_backbone_trains_as_in_a_first_step() -> None:
    module = model()
    engine = engine_of(module)
    freeze = BackboneFreeze(module)
    train(module, engine, 4, factor=0.0)
    begun = model()
    begun.load_state_dict(module.state_dict())
    freeze.thaw(engine)
    train(module, engine, 1, factor=1.0)
    train(begun, engine_of(begun), 1, factor=1.0)
    for name, weight in module["backbone"].named_parameters():
        torch.testing.assert_close(weight, begun["backbone"].get_parameter(name))


def test_the_backbones_rate_is_0_and_then_warms_up() -> None:
    factors = [backbone_factor(1.0, step, frozen_steps=3, warmup_steps=3) for step in range(8)]
    assert factors == [0, 0, 0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert backbone_factor(0.7, 5, frozen_steps=0, warmup_steps=3) == 0.7
    assert backbone_factor(0.2, 9, frozen_steps=3, warmup_steps=3) == 0.2
