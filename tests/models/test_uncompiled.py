"""When layers that could run compiled do not: small batches, evaluations, hooks, and what cannot be compiled."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_worker.subproc_pool import SubprocException
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config

from tests.models.small_compiled import (
    CHECKPOINTS,
    LINEAR,
    SHAPES,
    Graphs,
    Make,
    batch_of,
    corpus,
    graphs,
    loss_and_norm,
    loss_of,
    make,
)
from toolkit.models import compiled
from toolkit.models.compiled import compile_layers, layers_to_compile, uncompiled
from toolkit.recipe.model_cards import load_model_yaml
from toolkit.training.monitoring.flops import CostRecorder, cost_beside_training
from toolkit.training.monitoring.gradient_guard import GradientGuard

__all__ = ["corpus", "graphs", "make"]


def failing_at(number: int) -> Callable[..., Any]:
    """A backend that compiles so many graphs less one, and then no more."""
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(1)
        if len(seen) >= number:
            raise OSError("no space left on this device")
        return graph

    backend.seen = seen  # type: ignore[attr-defined]
    return backend


def test_hooks_of_the_first_step_cost_no_second_graph(make: Make, graphs: Graphs) -> None:
    model, batch = make("mbart50", LINEAR), batch_of(*SHAPES[0])
    compile_layers(model)
    guard = GradientGuard(model)
    with uncompiled(model):
        loss_and_norm(model, batch)
    loss_and_norm(model, batch)
    assert graphs == []
    guard.check(float(guard.count(torch.device("cpu"))))
    loss_and_norm(model, batch)
    assert len(graphs) == 2, "an encoder layer and a decoder layer"


def test_evaluations_run_as_they_are_written(make: Make, graphs: Graphs) -> None:
    model = make()
    compile_layers(model)
    model.eval()
    with torch.no_grad():
        loss_of(model, batch_of(*SHAPES[0]))
    assert graphs == []


def test_a_pass_that_begins_without_graphs_ends_without(make: Make, graphs: Graphs) -> None:
    model, batch = make("mbart50", *CHECKPOINTS), batch_of(*SHAPES[0])
    compile_layers(model)
    with uncompiled(model):
        loss = loss_of(model, batch)
    loss.backward()
    assert graphs == []
    loss_and_norm(model, batch)
    assert len(graphs) == 4


def test_the_reason_of_a_process_that_compiles_for_this_one_is_its_own() -> None:
    trace = (
        'Traceback (most recent call last):\n  File "cache.py", line 121, in put\nOSError: No space left on device\n'
    )
    assert "No space left" in compiled.reason_of(SubprocException(trace))
    assert compiled.reason_of(RuntimeError("first\nsecond")).endswith("first")
    assert compiled.reason_of(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(("name", "positions"), [("t5_base", 3000), ("t5_3b", 430)])
def test_auto_compiles_from_so_many_positions_on(name: str, positions: int) -> None:
    """docs/performance.md names them."""
    config = T5Config(**load_model_yaml(name).config)
    matrices = 4 * config.d_model * config.num_heads * config.d_kv + 2 * config.d_model * config.d_ff
    assert compiled.WORTH / 2 / matrices == pytest.approx(positions, rel=0.02)


def test_batches_that_are_not_worth_it_run_as_they_are_written(make: Make, graphs: Graphs) -> None:
    model, reference = make(), make()
    layer = layers_to_compile(model)[-1]
    most = max(sum(w.numel() for w in each.parameters() if w.dim() > 1) for each in layers_to_compile(model))
    compile_layers(model, worth=2.0 * most * 2 * 12)
    for shape, compiles in (((2, 11, 7), False), ((40, 33, 13), True), ((2, 11, 7), False)):
        before, batch = len(graphs), batch_of(*shape)
        assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(reference, batch), rel=1e-6)
        assert model.compiled_layers.choices[layer] is compiles
        assert (len(graphs) > before) is compiles


@pytest.mark.parametrize("encoder", ["stgcn", "conformer"])
def test_products_of_a_block_are_counted_for_each_vector(
    make: Make, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    """Blocks of ST-GCN have one for each landmark of each frame."""
    model = make("t5_small", f"model.pose_encoder={encoder}", "model.pose_encoder.hidden=256")
    found: dict[Any, float] = {}

    def runs_compiled(_: Any, layer: Any, flops: float) -> bool:
        found[layer] = flops
        return False

    monkeypatch.setattr(compiled.CompiledLayers, "runs_compiled", runs_compiled)
    compile_layers(model)
    blocks = {name: block for name, block in model.named_modules() if block in layers_to_compile(model)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(model, batch_of(*SHAPES[1]))
    counted = {name.removeprefix("PoseTranslator."): sum(of.values()) for name, of in counter.flop_counts.items()}
    of_poses = [name for name in blocks if name.startswith("pose_encoder")]
    assert of_poses
    for name in of_poses:  # a stride of two halves what follows it
        assert 0.9 <= found[blocks[name]] / counted[name] <= 2.1, name


def test_cost_is_recorded_in_a_pass_beside_training(make: Make, graphs: Graphs) -> None:
    dropout = ("model.dropout=0.2", "model.pose_encoder.dropout=0.2")
    model, reference, batch = make("t5_small", *dropout), make(), batch_of(*SHAPES[0])
    compile_layers(model)
    with CostRecorder(reference, batch) as recorder:
        loss_of(reference, batch)
    before = torch.get_rng_state()
    assert cost_beside_training(model, batch) == recorder.cost()
    assert graphs == []
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("overrides", [(), CHECKPOINTS], ids=["kept", "recomputed"])
def test_a_layer_that_cannot_be_compiled_costs_no_pass(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...]
) -> None:
    """Not the first one: those before it have run compiled, and are recomputed so."""
    batch, dropout = batch_of(*SHAPES[0]), ("model.pose_encoder.dropout=0.2", "model.dropout=0.2")
    backend = failing_at(4)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    reference, model = (make("t5_small", *overrides, *dropout) for _ in range(2))
    compile_layers(model)
    with caplog.at_level(logging.WARNING, "toolkit"):
        for number in range(2):
            results = []
            for each in (model, reference):
                torch.manual_seed(number)
                results.append(loss_and_norm(each, batch))
            assert results[0] == pytest.approx(results[1], rel=1e-6), "random numbers are drawn as without it"
    (message,) = (record.getMessage() for record in caplog.records if record.name == "toolkit")
    assert "no space left" in message and "\n" not in message
    assert len(backend.seen) == 4, "after the failure nothing is compiled"  # type: ignore[attr-defined]


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_the_forward_pass(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail))
    batch, model = batch_of(*SHAPES[0]), make()
    compile_layers(model)
    assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(make(), batch), rel=1e-6)
    assert not model.compiled_layers.works


def test_a_break_in_a_graph_is_a_reason_not_to_compile(
    make: Make, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    model.backbone.encoder.block[0].register_forward_pre_hook(lambda *_: None)  # outside of the graph
    part = model.backbone.encoder.block[1].layer[0].layer_norm
    part.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compile_layers(model)
    with caplog.at_level(logging.WARNING, "toolkit"):
        loss_and_norm(model, batch_of(*SHAPES[0]))
    assert len(graphs) == 3 and not model.compiled_layers.works
    (message,) = (record.getMessage() for record in caplog.records if record.name == "toolkit")
    assert "T5Block" in message


@pytest.mark.nightly
def test_a_cache_that_is_lost_in_mid_run_costs_no_pass(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The real compiler, whose folder became one that it cannot write to; then a batch that needs another graph."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    model, reference = make(), make()
    compile_layers(model)
    batches = batch_of(*SHAPES[0]), batch_of(1, 40, 9)  # one clip is a size of its own
    with caplog.at_level(logging.WARNING, "toolkit"):
        assert loss_and_norm(model, batches[0]) == pytest.approx(loss_and_norm(reference, batches[0]), rel=1e-4)
        assert model.compiled_layers.works
        shutil.rmtree(folder)
        folder.touch()
        for batch in reversed(batches):
            assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(reference, batch), rel=1e-4)
    assert not model.compiled_layers.works
    (message,) = (record.getMessage() for record in caplog.records if record.name == "toolkit")
    assert str(folder) in message and "\n" not in message
