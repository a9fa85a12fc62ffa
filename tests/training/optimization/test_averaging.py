"""The average of weights, and that the trained weights are restored after its use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from toolkit.training.optimization.averaging import averaged_weights, update_average


def engine() -> Any:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return SimpleNamespace(module=module, optimizer=optimizer, basic_optimizer=optimizer)


def step(engine: Any) -> None:
    engine.module(torch.ones(1, 3)).square().sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def test_the_average_is_that_of_the_weights_after_each_step() -> None:
    subject = engine()
    expected = None
    for number in range(1, 30):
        step(subject)
        update_average(subject, 0.6, number)
        weight = subject.module.weight.detach().clone()
        decay = min(0.6, (1 + number) / (10 + number))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    with averaged_weights(subject):
        torch.testing.assert_close(subject.module.weight.detach(), expected)


def test_the_weights_are_restored_bit_by_bit() -> None:
    subject = engine()
    step(subject)
    update_average(subject, 0.9, 1)
    step(subject)
    before = {name: weight.detach().clone() for name, weight in subject.module.named_parameters()}
    with averaged_weights(subject):
        assert not torch.equal(subject.module.weight, before["weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in subject.module.named_parameters())


def test_before_the_first_step_nothing_changes() -> None:
    subject = engine()
    before = subject.module.weight.detach().clone()
    with averaged_weights(subject):
        assert torch.equal(subject.module.weight, before)
