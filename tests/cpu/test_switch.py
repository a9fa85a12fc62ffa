"""TOOLKIT_CPU_CODE=0 leaves a model's layers and DeepSpeed's communication as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.cpu.dropout import CPUDropout
from toolkit.cpu.switch import SWITCH
from toolkit.training import engine


@pytest.mark.parametrize(("value", "is_used"), [(None, True), ("1", True), ("0", False)])
def test_one_variable_decides_on_layers_and_communication(
    monkeypatch: pytest.MonkeyPatch, value: str | None, is_used: bool
) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]))
    communication: list[Any] = []
    monkeypatch.setattr(deepspeed, "initialize", lambda **_: (made,))
    monkeypatch.setattr(engine, "parameter_groups", lambda *_: [])
    monkeypatch.setattr(engine, "client_optimizer", lambda *_: None)
    monkeypatch.setattr(engine, "communicate_on_cpu", lambda *found: communication.append(found))
    model, resolved = nn.Sequential(nn.Dropout(0.1)), SimpleNamespace(deepspeed={})
    engine.make_engine(model, resolved)  # type: ignore[arg-type]
    assert isinstance(model[0], CPUDropout) == is_used
    assert communication == [(made, resolved)] * is_used
