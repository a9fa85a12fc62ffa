"""Passes as CUDA graphs in a training loop with an engine of plain torch: what is captured, and what runs without."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.recorded_calls import RecordedCalls
from tests.training.small_trainers import batches_of, group, make
from toolkit.batching.collate import Batch
from toolkit.training import pass_graphs
from toolkit.training.monitoring.gradient_guard import TrainingStopped
from toolkit.training.trainer import Trainer

__all__ = ["group", "make"]
GRAPHS = ("training.compile=graphs", "ds.zero_optimization.stage=0", "training.padding=ladder")
DROPOUT = ("model.dropout=0.3", "model.pose_encoder.dropout=0.3")
STEPS = 4

Make = Callable[..., Trainer]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> RecordedCalls:
    """What captures in place of CUDA."""
    recorded = RecordedCalls()
    monkeypatch.setattr(pass_graphs, "capture_on", lambda device: recorded)
    return recorded


def losses_of(trainer: Trainer, steps: int = STEPS) -> list[float]:
    """Losses of so many steps, the clipped norm of the first one's gradient included in what comes after it."""
    stream, found = batches_of(trainer), []
    torch.manual_seed(1)
    for _ in range(steps):
        trainer.step(next(stream))
        found.append(trainer.loss)
    return found


_written: dict[tuple[str, ...], list[float]] = {}


def written(make: Make, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[float]:
    """Losses without graphs, by the same layers; computed once."""
    if overrides not in _written:
        with monkeypatch.context() as patched:
            patched.setattr(pass_graphs, "capture_on", lambda device: None)
            _written[overrides] = losses_of(make(*GRAPHS, *overrides))
    return _written[overrides]


def test_micro_batches_of_different_shapes_are_replayed_from_the_second_step_on(
    make: Make, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(*GRAPHS)
    losses = losses_of(trainer)
    assert trainer.graphs is not None
    assert capture.replays > len(capture.captured) == len(trainer.graphs.graphs) >= 2
    assert losses == pytest.approx(written(make, monkeypatch), rel=1e-5)
    plain = make("training.compile=false", "ds.zero_optimization.stage=0", "training.padding=ladder")
    assert losses == pytest.approx(losses_of(plain), rel=1e-5)
    assert trainer.engine.steps == STEPS
    assert not any(total.requires_grad for total in trainer.graphs.sums), "replays keep nothing for autograd"
    memory = [graph.batch.poses.untyped_storage().data_ptr() for graph in trainer.graphs.graphs.values()]
    assert len(set(memory)) < len(memory), "graphs read from memory that they share"


def test_a_replay_draws_the_dropout_that_the_pass_would_have_drawn(
    make: Make, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert losses_of(make(*GRAPHS, *DROPOUT)) == pytest.approx(written(make, monkeypatch, *DROPOUT), rel=1e-5)
    assert capture.replays


def test_the_stand_in_keeps_nothing_that_a_pass_computes() -> None:
    """What it kept would fill the memory of a run of some epochs."""
    weights, total, made = torch.nn.Parameter(torch.ones(3)), torch.zeros(3), []

    def call() -> torch.Tensor:
        product = weights * 2
        made.append(weakref.ref(product))
        total.add_(torch.autograd.grad(product.square().sum(), weights)[0])
        return product.detach().sum()

    result, replay = RecordedCalls()(call)
    assert not any(reference() is not None for reference in made)
    with torch.no_grad():
        weights.fill_(3.0)
        total.zero_()
    for _ in range(2):
        replay()
    assert result.item() == 18.0 and total.tolist() == [48.0] * 3
    assert not result.requires_grad and not total.requires_grad


def test_two_replays_of_one_batch_have_other_dropout(make: Make, capture: RecordedCalls) -> None:
    trainer = make(*GRAPHS, *DROPOUT, "training.learning_rate=1e-12", "training.warmup_ratio=0")
    batches, losses = next(batches_of(trainer)), []
    for _ in range(4):
        trainer.step(batches)
        losses.append(trainer.loss)
    assert capture.replays >= 6 and len(set(losses)) == 4


def test_passes_that_can_be_captured_touch_no_weight_that_hooks_hold(make: Make, capture: RecordedCalls) -> None:
    """Autograd would wait for the stream on which such a weight was first used, which a capture must not."""
    trainer, found = make(*GRAPHS), []
    assert trainer.graphs is not None
    own, module = trainer.graphs.losses, trainer.engine.module
    weights = dict(module.named_parameters())

    def losses(batch: Batch, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nll, ctc = own(batch, model)
        found.append({id(leaf) for leaf in leaves_of(nll)} & {id(weight) for weight in weights.values()})
        return nll, ctc

    trainer.graphs.losses = losses
    batches = next(batches_of(trainer))
    trainer.step(batches)
    assert all(found), "the first step's gradients are watched by hooks"
    found.clear()
    trainer.step(batches)
    assert found and not any(found)
    now = dict(module.named_parameters())
    assert now.keys() == weights.keys() and all(now[name] is weight for name, weight in weights.items())


def leaves_of(value: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that autograd has for a value."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


def test_no_more_shapes_are_captured_than_the_limit(
    make: Make, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_graphs, "MOST_GRAPHS", 1)
    losses = losses_of(make(*GRAPHS))
    assert len(capture.captured) == 1 and capture.replays
    assert losses == pytest.approx(written(make, monkeypatch), rel=1e-5)


@pytest.mark.parametrize("works", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_capture_that_fails_costs_no_step_and_has_one_line(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, works: int
) -> None:
    capture, left = RecordedCalls(), [works]

    def failing(call: Callable[[], torch.Tensor]) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return capture(call)
        call()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(pass_graphs, "capture_on", lambda device: failing)
    with caplog.at_level(logging.WARNING, logger="toolkit"):
        trainer = make(*GRAPHS, *DROPOUT)
        losses = losses_of(trainer)
    lines = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(lines) == 1 and "not permitted" in lines[0] and "\n" not in lines[0]
    assert trainer.graphs is not None and len(trainer.graphs.graphs) == works and bool(capture.replays) == bool(works)
    assert losses == pytest.approx(written(make, monkeypatch, *DROPOUT), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make: Make, capture: RecordedCalls) -> None:
    trainer = make(*GRAPHS)
    stream = batches_of(trainer)
    first = next(stream)
    for _ in range(2):
        trainer.step(first)
    assert capture.replays
    first[-1].poses.fill_(float("nan"))
    weights = {name: weight.clone() for name, weight in trainer.engine.module.state_dict().items()}
    with pytest.raises(TrainingStopped):
        trainer.step(first)
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.engine.module.state_dict().items())


def test_a_run_that_has_ended_keeps_no_graphs(make: Make, capture: RecordedCalls) -> None:
    trainer = make(*GRAPHS, "training.max_steps=2")
    trainer.run(batches_of(trainer))
    assert trainer.progress.step == 2 and capture.captured and trainer.graphs is None


@pytest.mark.nightly
def test_an_evaluation_between_steps_changes_nothing(
    make: Make, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(*GRAPHS, "evaluation.max_new_tokens=4", "evaluation.num_beams=2")
    stream, losses = batches_of(trainer), []
    for _ in range(STEPS):
        trainer.step(next(stream))
        losses.append(trainer.loss)
        trainer.translate(trainer.corpus.splits["train"])
        trainer.engine.train()
    assert capture.replays
    assert losses == pytest.approx(written(make, monkeypatch), rel=1e-5)
