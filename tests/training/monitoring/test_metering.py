"""Figures of a step: counts summed over ranks, divided by seconds of a clock, and what is left out of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit.batching.collate import Batch
from toolkit.cluster.ranks import Ranks
from toolkit.models.backbone import set_checkpointing
from toolkit.models.backbone_config import backbone_config
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.translator import PoseTranslator
from toolkit.planning.costs.counts import empty_translator
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.training.monitoring import metering
from toolkit.training.monitoring.flops import Cost
from toolkit.training.monitoring.memory_phases import MemoryPhases
from toolkit.training.monitoring.metering import StepCounts, StepMeter, product_type

CPU = torch.device("cpu")
RANKS = 2


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metering, "time", clock)
    return clock


@pytest.fixture
def make(clock: Clock, resolve: Callable[..., ResolvedRun], monkeypatch: pytest.MonkeyPatch) -> Callable[[], StepMeter]:
    """A meter of two ranks whose counts are equal, each with a peak of 5e12 FLOP/s."""

    def all_reduce(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        if op == torch.distributed.ReduceOp.SUM:
            tensor *= RANKS

    monkeypatch.setattr(metering.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(metering, "measure_peak", lambda device, dtype: 5e12)
    return lambda: StepMeter(resolve(), CPU, Ranks(world_size=RANKS), MemoryPhases())


def batch_of(clips: int, frames: int, real_frames: int, tokens: int) -> Any:
    """A micro-batch as far as a meter looks at it."""
    mask, labels = torch.ones(clips, frames, dtype=torch.bool), torch.zeros(clips, 6, dtype=torch.long)
    counts = {"num_clips": clips, "num_frames": real_frames, "num_target_tokens": tokens}
    return SimpleNamespace(frame_mask=mask, labels=labels, **counts)


BATCHES = [batch_of(3, 40, 90, 12), batch_of(2, 10, 20, 8)]


def begun(meter: StepMeter) -> StepCounts:
    return StepCounts(*meter.begin(BATCHES).tolist())


def test_the_cost_of_compiled_layers_is_measured_before_their_first_pass(
    make: Callable[[], StepMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(metering, "cost_beside_training", lambda model, batch: calls.append((model, batch)) or "cost")
    meter, batch, model = make(), SimpleNamespace(to=lambda device: f"on {device}"), SimpleNamespace(compiled_layers=1)
    for _ in range(2):
        with meter.forward(model, batch):  # type: ignore[arg-type]
            assert calls == [(model, "on cpu")]
    assert meter.cost == "cost"


def translator(backbone: str, *, recomputes: bool = False) -> PoseTranslator:
    """A tiny one that trains, with the layers of a GPU."""
    recipe = load_recipe("demo", [f"model.backbone={backbone}", "model.tiny=true", "model.from_scratch=true"])
    model = empty_translator(backbone_config(recipe.model), recipe).to_empty(device="cpu").train()
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.uniform_(tensor, -0.05, 0.05) if tensor.is_floating_point() else tensor.zero_()
    use_gpu_layers(model)
    set_checkpointing(model.backbone, recomputes)
    return model


def test_layers_that_are_recomputed_run_as_they_ran_first(make: Callable[[], StepMeter]) -> None:
    """Layers with hooks, which count their products, join no weights: torch refuses to recompute those otherwise."""
    model = translator("t5_small", recomputes=True)
    meter, batch = make(), Batch(
        uids=["x"] * 2, texts=["x"] * 2, clips=torch.arange(2), labels=torch.full((2, 9), 5),
        labelled=torch.arange(18), is_filler=torch.zeros(2, dtype=torch.bool), num_clips=2, num_frames=48,
        **{
            name: torch.ones(shape, dtype=dtype)
            for name, (shape, dtype) in model.config.input_shapes(2, 24).items()
        },
    )  # fmt: skip
    with meter.forward(model, batch):
        output = model(**batch.inputs, labels=batch.labels)
    output.logits.sum().backward()
    assert meter.cost is not None and meter.cost.of(batch) > 0
    attention = model.backbone.get_encoder().block[0].layer[0].SelfAttention
    assert all(layer.weight.grad is not None for layer in (attention.q, attention.k, attention.v))


def test_counts_are_those_of_all_micro_batches_of_all_ranks(make: Callable[[], StepMeter], clock: Clock) -> None:
    meter = make()
    clock.now += 0.5
    counts = begun(meter)
    assert (counts.tokens, counts.clips, counts.frames, counts.padded_frames) == (40, 10, 220, 280)
    assert (counts.flops, counts.waited) == (0, 1.0)


def test_figures_of_a_step_are_counts_by_its_seconds(make: Callable[[], StepMeter], clock: Clock) -> None:
    meter = make()
    clock.now += 0.5
    counts = begun(meter)
    clock.now += 1.5
    seconds, figures = meter.end(counts)
    assert seconds == 2
    assert figures["clips_per_second"] == 5
    assert figures["frames_per_second"] == 110
    assert figures["tokens_per_second"] == 20
    assert figures["padding_share"] == pytest.approx(60 / 280)
    assert figures["data_wait_share"] == 0.25
    assert figures["memory_gib"] > 0
    assert not {"tflops", "mfu"} & figures.keys(), "what a batch costs is not known yet"
    clock.now += 4
    assert meter.end(begun(meter))[0] == 4, "a step begins where the one before ended"


def test_what_happens_between_steps_counts_in_none(make: Callable[[], StepMeter], clock: Clock) -> None:
    meter = make()
    clock.now += 100
    meter.restart()
    clock.now += 1
    counts = begun(meter)
    assert counts.waited == RANKS * 1
    assert meter.end(counts)[0] == 1


def test_a_wait_is_never_more_than_the_step(make: Callable[[], StepMeter], clock: Clock) -> None:
    """Another rank may have waited longer than this rank's step took."""
    meter = make()
    clock.now += 1
    counts = StepCounts(tokens=1, clips=1, frames=1, padded_frames=1, flops=0, waited=9.0)
    assert meter.end(counts)[1]["data_wait_share"] == 1


def test_utilisation_is_of_all_ranks_peaks(make: Callable[[], StepMeter], clock: Clock) -> None:
    meter = make()
    assert meter.peak == 1e13
    meter.cost = Cost(per_frame=1e9, per_token=0, positions_per_frame=0, encoder_attention=0, decoder_attention=0)
    clock.now += 0.1
    counts = begun(meter)
    assert counts.flops == RANKS * (3 * 40 + 2 * 10) * 1e9, "padding is computed, too"
    figures = meter.end(counts)[1]
    assert figures["tflops"] == pytest.approx(2.8)
    assert figures["mfu"] == pytest.approx(0.28)


def test_only_the_first_forward_pass_is_recorded(
    make: Callable[[], StepMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []

    class Recorder:
        def __init__(self, model: Any, batch: Any) -> None:
            self.batch = batch

        def __enter__(self) -> Recorder:
            recorded.append("begin")
            return self

        def __exit__(self, *error: object) -> None:
            recorded.append("end")

        def cost(self) -> Any:
            return self.batch

    monkeypatch.setattr(metering, "CostRecorder", Recorder)
    meter = make()
    for batch in BATCHES:
        with meter.forward(translator("demo"), batch):
            recorded.append(batch)
    assert recorded == ["begin", BATCHES[0], "end", BATCHES[1]]
    assert meter.cost is BATCHES[0]


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ((), torch.bfloat16),
        (("ds.bf16.enabled=false",), torch.float32),
        (("ds.bf16.enabled=false", "ds.fp16.enabled=true"), torch.float16),
        (("ds.bf16.enabled=false", "ds.torch_autocast={enabled: true, dtype: bfloat16}"), torch.bfloat16),
    ],
)
def test_products_are_of_the_type_that_the_run_computes_in(overrides: tuple[str, ...], dtype: torch.dtype) -> None:
    resolved = resolve_named("bart_large", overrides, 1, has_gpu=True, ds="zero1", needs_data=False)
    assert product_type(resolved) == dtype


def test_a_step_looks_once_at_the_memory_of_the_gpu_and_never_for_its_process(
    make: Callable[[], StepMeter], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    looks: list[int] = []

    def figures() -> dict[str, Any]:
        looks.append(1)
        return {name: {"all": {"current": 2**30, "peak": 2**31}} for name in ("allocated_bytes", "reserved_bytes")}

    meter = make()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", figures)
    monkeypatch.setattr(metering.psutil, "Process", lambda *_: pytest.fail("looked for again"))
    counts = begun(meter)
    clock.now += 1
    _, found = meter.end(counts)
    assert (found["gpu_memory_gib"], found["gpu_peak_memory_gib"]) == (1.0, 2.0) and found["memory_gib"] > 0
    assert len(looks) == 1
