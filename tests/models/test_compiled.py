"""Layers compiled one by one: a graph without a break for all that are alike, and the same losses."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.by_night import cases
from tests.models.small_compiled import (
    CHECKPOINTS,
    LINEAR,
    LORA,
    SHAPES,
    Graphs,
    Make,
    batch_of,
    corpus,
    graphs,
    loss_and_norm,
    make,
)
from toolkit.models import compiled
from toolkit.models.backbone import stacks
from toolkit.models.compiled import before_compilations, compile_layers, layers_to_compile
from toolkit.models.gpu_layers import use_gpu_layers

__all__ = ["corpus", "graphs", "make"]

# Backbone and overrides -> calls that the graphs of one batch hold, all graphs together.
CALLS = {
    "t5": ("t5_small", (), 301),
    "t5, lora, checkpoints": ("t5_small", (*LORA, *CHECKPOINTS), 361),
    "gated, checkpoints": ("mt5_base", CHECKPOINTS, 337),
    "bart": ("mbart50", (), 95),
    "t5, lora": ("t5_small", LORA, 361),
    "t5, checkpoints": ("t5_small", CHECKPOINTS, 301),
    "gated": ("mt5_base", (), 337),
    "gated, lora": ("mt5_base", LORA, 397),
    "bart, lora, checkpoints": ("mbart50", (*LORA, *CHECKPOINTS), 125),
    "m2m100": ("m2m100", (), 95),
    "umt5": ("umt5_base", (), 206),
    "longt5": ("longt5_base", (), 656),
    "transformer": ("transformer", (), 126),
    "conformer": ("t5_small", ("model.pose_encoder=conformer",), 357),
    "stgcn": ("t5_small", ("model.pose_encoder=stgcn",), 349),
    "qwen3": ("qwen3_0_6b", (), 95),
    "llama, lora, checkpoints": ("llama3_2_1b", (*LORA, *CHECKPOINTS), 114),
    "gemma2": ("gemma2_2b", (), 118),
    "t5gemma": ("t5gemma_2b_2b", (), 271),
    "t5gemma2": ("t5gemma2_270m", (), 259),
}
BY_DAY = ("t5, lora, checkpoints", "gated, checkpoints", "bart")


@pytest.mark.parametrize("name", cases(CALLS, BY_DAY))
def test_layers_are_captured_whole_and_compute_the_same(name: str, make: Make, graphs: Graphs) -> None:
    backbone, overrides, calls = CALLS[name]
    batch = batch_of(*SHAPES[0])
    expected = loss_and_norm(make(backbone, *overrides), batch)
    model = make(backbone, *overrides)
    names = list(model.state_dict())
    count = compile_layers(model)
    assert loss_and_norm(model, batch) == pytest.approx(expected, rel=1e-6)
    assert model.compiled_layers.works, "a layer has a graph without a break"
    assert sum(map(len, graphs)) == calls
    assert 3 <= len(graphs) <= count
    assert list(model.state_dict()) == names


def test_each_compilation_is_announced(make: Make, graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    model, announced = make("mbart50"), []
    compile_layers(model)
    with caplog.at_level(logging.INFO, "toolkit"), before_compilations(lambda: announced.append(len(graphs))):
        loss_and_norm(model, batch_of(*SHAPES[0]))
    assert announced == list(range(4)), "before it begins"
    assert sum("compiling" in record.getMessage() for record in caplog.records) == 4
    loss_and_norm(model, batch_of(1, 9, 1))
    assert len(announced) == 4 < len(graphs), "no more outside"
    with before_compilations(lambda: None):
        torch._dynamo.reset()  # as DeepCompile does within a run


@pytest.mark.parametrize("overrides", [(), CHECKPOINTS], ids=["plain", "checkpoints"])
def test_layers_for_gpus_are_captured_whole(make: Make, graphs: Graphs, overrides: tuple[str, ...]) -> None:
    model, reference, batch = make("t5_small", *overrides), make(), batch_of(*SHAPES[0])
    use_gpu_layers(model)
    compile_layers(model)
    assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(reference, batch), rel=1e-5)
    assert model.compiled_layers.works and len(graphs) == 6
    assert sum(map(len, graphs)) < CALLS["t5"][2]


def test_layers_for_gpus_that_are_alike_share_a_graph(make: Make, graphs: Graphs) -> None:
    model = make()
    for stack in stacks(model.backbone):
        stack.block.extend(copy.deepcopy(stack.block[-1]) for _ in range(2))
    use_gpu_layers(model)
    compile_layers(model)
    loss_and_norm(model, batch_of(*SHAPES[0]))
    assert len(layers_to_compile(model)) == 10 and len(graphs) == 6


def test_other_sizes_need_no_other_graphs(make: Make, graphs: Graphs) -> None:
    model, reference = make(), make()
    compile_layers(model)
    counts = []
    for shape in SHAPES:
        batch = batch_of(*shape)
        assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(reference, batch), rel=1e-6)
        counts.append(len(graphs))
    assert counts == [6] * len(SHAPES), "two convolutions, and two kinds of layer in encoder and decoder"
    # A batch without padding has no mask, and one clip is a size of its own.
    for shape in ((2, 16, 9), (1, 16, 9), (1, 40, 4), (5, 40, 4)):
        loss_and_norm(model, batch_of(*shape, padded=0))
    assert len(graphs) <= 3 * 6


@pytest.mark.parametrize("name", cases(("bart", "qwen3", "t5, lora, checkpoints"), ("bart", "qwen3")))
def test_backward_passes_are_captured_too(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    backbone, overrides, _ = CALLS[name]
    model, reference, batch = make(backbone, *overrides), make(backbone, *overrides), batch_of(*SHAPES[0])
    compile_layers(model)
    assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(reference, batch), rel=1e-5)
    assert model.compiled_layers.works


def test_layers_that_are_alike_share_a_graph(make: Make, graphs: Graphs) -> None:
    model = make("transformer")
    compile_layers(model)
    loss_and_norm(model, batch_of(*SHAPES[0]))
    assert len(layers_to_compile(model)) == 6
    assert len(graphs) == 4, "two convolutions of different strides, an encoder layer and a decoder layer"


def test_they_compute_in_autocast(make: Make, graphs: Graphs) -> None:
    """Of the backbone: a convolution in bf16 asks the processor on CPUs, which breaks its graph there."""
    model, reference, batch = make("mbart50", LINEAR), make("mbart50", LINEAR), batch_of(*SHAPES[0])
    compile_layers(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_and_norm(each, batch) for each in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(loss_and_norm(reference, batch), rel=1e-5), "it has no effect"
    assert len(graphs) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("overrides", [(), (*LORA, *CHECKPOINTS)], ids=["plain", "lora, checkpoints"])
def test_kernels_compute_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, reference = (make("t5_small", *overrides) for _ in range(2))
    compile_layers(model)
    for shape in SHAPES[:2]:
        batch = batch_of(*shape)
        assert loss_and_norm(model, batch) == pytest.approx(loss_and_norm(reference, batch), rel=1e-4)
    assert model.compiled_layers.works
    # A later start, which forgets everything but the cache.
    torch._dynamo.reset()
    counters.clear()
    model = make("t5_small", *overrides)
    compile_layers(model)
    loss_and_norm(model, batch_of(*SHAPES[0]))
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] >= 6
