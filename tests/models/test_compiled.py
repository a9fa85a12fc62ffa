"""Layers compiled one by one: a graph without a break for all that are alike, the same losses, and a way without."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo import config as graph_settings
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch import config as gradient_settings
from torch.fx.experimental import _config as size_settings
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config

from tests.by_night import cases
from tests.written_corpora import write_corpus
from toolkit.batching.collate import Batch
from toolkit.corpus.packed import Clip, Corpus
from toolkit.models import PoseTranslator, compiled
from toolkit.models.backbone import stacks
from toolkit.models.build import build_processor, build_translator
from toolkit.models.compiled import before_compilations, compile_layers, layers_to_compile, uncompiled
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.loss import translation_losses
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.model_cards import load_model_yaml
from toolkit.recipe.resolve import resolve_named
from toolkit.training.monitoring.flops import CostRecorder, cost_beside_training
from toolkit.training.monitoring.gradient_guard import GradientGuard

LORA = ("model.lora.r=4", "model.lora.dropout=0")
LINEAR = "model.pose_encoder=linear"
CHECKPOINTS = ("training.gradient_checkpointing=true",)
SMALL = (
    *("model.tiny=true", "model.tokenizer=bytes", "model.from_scratch=true", "ds.bf16.enabled=false"),
    *("model.dropout=0", "model.pose_encoder.dropout=0", "model.pose_encoder.hidden=16"),
)
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
SHAPES = [(2, 11, 7), (3, 16, 9), (4, 22, 5), (2, 33, 13)]  # clips, frames, tokens

Make = Callable[..., PoseTranslator]
Graphs = list[list[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    numbers = np.random.default_rng(0)
    clips = [Clip(f"clip-{n}", "hi", numbers.normal(size=(9, 50, 3)).astype(np.float16)) for n in range(2)]
    folder = tmp_path_factory.mktemp("compiled") / "corpus"
    return write_corpus(folder, {"train": clips}, load_landmark_set("hands_body_50"), 10.0, NORMALISATION)


@pytest.fixture
def make(corpus: Corpus) -> Make:
    """Builds a small translator; the same weights for the same settings."""

    def make(name: str = "t5_small", *overrides: str) -> PoseTranslator:
        settings = [f"model.backbone={name}", *SMALL, *overrides]
        resolved = resolve_named("t5_small", settings, 1, has_gpu=True, needs_data=False)
        torch.manual_seed(0)
        return build_translator(resolved, corpus, build_processor(resolved.recipe, corpus).tokenizer).train()

    return make


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """The calls of each graph that is captured; graphs run as they were captured."""
    captured: Graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        captured.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call_")])
        return graph

    monkeypatch.setattr(compiled, "BACKEND", keep)
    torch._dynamo.reset()
    with (  # what `compile_layers` sets is as before after the test
        graph_settings.patch(recompile_limit=8, specialize_float=False),
        gradient_settings.patch(force_non_lazy_backward_lowering=False),
        size_settings.patch(use_duck_shape=True),
    ):
        yield captured
    torch._dynamo.reset()


def batch_of(clips: int, frames: int, tokens: int, *, padded: int = 3) -> Batch:
    """A batch whose first clip is shorter than the others."""
    numbers = torch.Generator().manual_seed(clips * 10_000 + frames * 100 + tokens)
    mask = torch.ones(clips, frames, dtype=torch.bool)
    mask[0, frames - padded :] = False
    return Batch(
        uids=[""] * clips,
        texts=[""] * clips,
        clips=torch.arange(clips),
        poses=torch.randn(clips, frames, 50, 3, generator=numbers),
        visible=torch.rand(clips, frames, 50, generator=numbers) > 0.2,
        frame_mask=mask,
        labels=torch.randint(5, 80, (clips, tokens), generator=numbers),
        labelled=torch.arange(clips * tokens),
        is_filler=torch.zeros(clips, dtype=torch.bool),
        num_clips=clips,
        num_frames=int(mask.sum()),
    )


def loss_of(model: PoseTranslator, batch: Batch) -> torch.Tensor:
    return translation_losses(
        model,
        batch.poses,
        batch.visible,
        batch.frame_mask,
        batch.labels,
        batch.labelled,
        torch.tensor([0, 1, 2]),
    )[0]


def loss_and_norm(model: PoseTranslator, batch: Batch) -> tuple[float, float]:
    """The loss of a batch and the norm of its gradient."""
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), float(torch.nn.utils.get_total_norm(gradients))


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


def test_layers_for_gpus_are_captured_whole(make: Make, graphs: Graphs) -> None:
    model, reference, batch = make(), make(), batch_of(*SHAPES[0])
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


def test_they_compute_in_autocast(make: Make, graphs: Graphs) -> None:
    """Of the backbone: a convolution in bf16 asks the processor on CPUs, which breaks its graph there."""
    model, reference, batch = make("mbart50", LINEAR), make("mbart50", LINEAR), batch_of(*SHAPES[0])
    compile_layers(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_and_norm(each, batch) for each in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(loss_and_norm(reference, batch), rel=1e-5), "it has no effect"
    assert len(graphs) == 2


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
