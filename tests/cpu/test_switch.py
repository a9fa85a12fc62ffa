"""TOOLKIT_CPU_CODE=0 leaves a model's layers and DeepSpeed's communication as they are."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.cpu.dropout import CPUDropout
from toolkit.cpu.switch import SWITCH
from toolkit.recipe.load import load_recipe
from toolkit.training import engine

ALONE = {"tensor_parallel_size": 1, "data_parallel_size": 1, "zero_stage": 0}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a DeepSpeed that does nothing gives for an engine."""
    deepspeed = pytest.importorskip("deepspeed")
    engine_made = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(deepspeed, "initialize", lambda **_: (engine_made,))
    monkeypatch.setattr(engine, "parameter_groups", lambda *_: [])
    monkeypatch.setattr(engine, "client_optimizer", lambda *_: None)
    monkeypatch.setattr(engine, "skip_sums_of_one_rank", lambda *_: None)
    monkeypatch.setattr(engine, "count_no_hooks", lambda *_: None)
    monkeypatch.setattr(engine, "forget_steps", lambda *_: None)
    monkeypatch.setattr(engine, "forget_gradients_at_once", lambda *_: None)
    monkeypatch.setattr(engine, "join_gradients", lambda *_: None)
    return engine_made


@pytest.mark.parametrize(("value", "is_used"), [(None, True), ("1", True), ("0", False)])
def test_one_variable_decides_on_layers_and_communication(
    monkeypatch: pytest.MonkeyPatch, made: Any, value: str | None, is_used: bool
) -> None:
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    communication: list[Any] = []
    monkeypatch.setattr(engine, "communicate_on_cpu", lambda *found: communication.append(found))
    model, resolved = (
        nn.Sequential(nn.Dropout(0.1)),
        SimpleNamespace(deepspeed={}, recipe=load_recipe("demo"), **ALONE),
    )
    engine.make_engine(model, resolved)  # type: ignore[arg-type]
    assert isinstance(model[0], CPUDropout) == is_used
    assert communication == [(made, resolved)] * is_used


def test_layers_that_are_compiled_are_torchs_own(
    monkeypatch: pytest.MonkeyPatch, made: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    compiled: list[Any] = []

    def compile_layers(model: Any, *, worth: float) -> None:
        assert worth == 0.0, "all batches"
        compiled.append(model)

    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(engine, "communicate_on_cpu", lambda *_: None)
    monkeypatch.setattr(engine, "compile_layers", compile_layers)
    model, recipe = nn.Sequential(nn.Dropout(0.1)), load_recipe("demo", ["training.compile=true"])
    with caplog.at_level(logging.INFO, "toolkit"):
        engine.make_engine(model, SimpleNamespace(deepspeed={}, recipe=recipe, **ALONE))  # type: ignore[arg-type]
    assert type(model[0]) is nn.Dropout
    assert compiled == [model]
    lines = [record.getMessage() for record in caplog.records]
    assert any("training.compile=true" in line for line in lines)
    assert any(str(tmp_path / "file" / "cache") in line for line in lines), "a cache that cannot be written"
