"""FLOPs counted from the modules agree with torch's own counter; the peak is the fastest trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from toolkit.batching.collate import Batch
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_processor, build_translator
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.monitoring.flops import CostRecorder, measure_peak


def batch_of(clips: int, frames: int, tokens: int, corpus: Corpus) -> Batch:
    points, channels = corpus.landmark_set.num_points, corpus.landmark_set.num_channels
    return Batch(
        uids=["x"] * clips,
        texts=["x"] * clips,
        clips=torch.arange(clips),
        poses=torch.randn(clips, frames, points, channels),
        visible=torch.ones(clips, frames, points, dtype=torch.bool),
        frame_mask=torch.ones(clips, frames, dtype=torch.bool),
        labels=torch.full((clips, tokens), 5),
        labelled=torch.arange(clips * tokens),
        is_filler=torch.zeros(clips, dtype=torch.bool),
        num_clips=clips,
        num_frames=clips * frames,
    )


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    output = model(poses=batch.poses, visible=batch.visible, frame_mask=batch.frame_mask, labels=batch.labels)
    return output.logits.square().sum()


@pytest.mark.parametrize("backbone", ["demo", "mbart50", "qwen3_0_6b"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_cost_of_other_batches_follows_from_one(
    resolve: Callable[..., ResolvedRun], corpus: Corpus, backbone: str, frozen: bool
) -> None:
    # Eager attention is made of products that torch's counter knows on a CPU.
    resolved = resolve(
        f"model.backbone={backbone}",
        "model.tokenizer=bytes",
        "model.tiny=true",
        "training.ctc_weight=0",
        "evaluation.ctc_weight=0",
    )
    processor = build_processor(resolved.recipe, corpus)
    model = build_translator(resolved, corpus, processor.tokenizer)
    model.backbone.set_attn_implementation("eager")
    if frozen:
        model.backbone.requires_grad_(False)
    first = batch_of(2, 16, 9, corpus)
    with CostRecorder(model, first) as recorder:
        loss_of(model, first)
    cost = recorder.cost()
    assert cost is not None
    for shape in ((2, 16, 9), (3, 64, 12), (1, 128, 40)):
        batch = batch_of(*shape, corpus)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, batch).backward()
        assert cost.of(batch) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_peak_is_the_fastest_of_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, 30.0, 35.0])  # trials of 4, 2, 3 and 5 seconds
    monkeypatch.setattr("toolkit.training.monitoring.flops.time.perf_counter", lambda: next(clock))
    assert measure_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 2


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_peak_is_that_of_the_type_in_which_a_cpu_trains(
    monkeypatch: pytest.MonkeyPatch, is_fast: bool, dtype: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr("toolkit.training.monitoring.flops.has_fast_bf16", lambda: is_fast)
    monkeypatch.setattr("toolkit.training.monitoring.flops.torch.mm", lambda left, right: seen.append(left.dtype))
    assert measure_peak(torch.device("cpu"), torch.bfloat16) > 0
    assert set(seen) == {dtype}
