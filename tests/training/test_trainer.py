"""One optimizer step with an engine of plain torch: loss, gradient, learning rates, and what stops a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training.small_trainers import batches_of, group, make, names_of, watched
from toolkit.checkpointing.checkpoints import Progress
from toolkit.training import trainer as module
from toolkit.training.engine import gradient_norm
from toolkit.training.monitoring.gradient_guard import TrainingStopped
from toolkit.training.optimization.schedules import scheduled_factor
from toolkit.training.trainer import Trainer

__all__ = ["group", "make"]


def test_a_step_has_the_mean_loss_and_gradient_of_all_its_tokens(make: Callable[..., Trainer]) -> None:
    trainer = make("ds.zero_optimization.stage=0")
    batches = next(batches_of(trainer))
    assert len(batches) == 2
    tokens, loss = 0, torch.zeros(())
    for batch in batches:
        inputs = {key: getattr(batch, key) for key in ("poses", "visible", "frame_mask", "labels")}
        logits = trainer.engine(**inputs).logits
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        tokens += batch.num_target_tokens
    parameters = list(trainer.engine.module.parameters())
    gradients = torch.autograd.grad(loss / tokens, parameters)
    norms: list[float] = []
    stepped: list[float] = []
    trainer._log_step = lambda speed, rate, norm, ctc: norms.append(norm)  # type: ignore[method-assign]
    take_step = trainer.engine.step
    trainer.engine.step = lambda: (stepped.append(float(gradient_norm(trainer.weights))), take_step())
    assert trainer.step(batches) is False
    assert trainer.loss == pytest.approx(loss.item() / tokens, rel=1e-5)
    assert norms == pytest.approx([float(nn.utils.get_total_norm(gradients))], rel=1e-4)
    assert norms[0] > trainer.recipe.training.gradient_clipping == 1.0
    assert stepped == pytest.approx([1.0], rel=1e-4), "the weights change by the clipped gradient"
    progress = trainer.progress
    assert (progress.step, progress.epoch_step, progress.clips, trainer.engine.steps) == (1, 1, 3, 1)
    assert trainer.engine.boundaries == [False, True], "gradients are reduced after the last micro-batch"


def fixed_losses(trainer: Trainer, nll: float, ctc: float) -> None:
    """Give each micro-batch the same losses."""
    trainer._losses = lambda batch: (  # type: ignore[method-assign]
        torch.tensor(nll, requires_grad=True),
        torch.tensor(ctc, requires_grad=True),
    )


def test_losses_are_divided_by_the_tokens_of_all_ranks_and_both_are_logged(make: Callable[..., Trainer]) -> None:
    trainer = make("training.ctc_weight=0.5", "ds.zero_optimization.stage=1")
    batches = next(batches_of(trainer))
    trainer.ranks = replace(trainer.ranks, world_size=4)  # DeepSpeed divides by it
    calls = watched(trainer, "meter", "tracker", "line", "rank_watch", "gradient_guard")
    fixed_losses(trainer, 6.0, 4.0)
    trainer.step(batches)
    assert trainer.engine.losses == [(6 + 0.5 * 4) * 4 / 8] * 2
    assert trainer.loss == 12 / 8
    ((step, values),) = [call.args for call in calls.tracker.log.call_args_list]
    assert (step, values["loss"], values["ctc_loss"], values["epoch"]) == (1, 12 / 8, 8 / 8, 1 / 2)
    assert (values["grad_norm"], "step" in values) == (123.0, False)
    assert calls.line.update.call_args.args[0].loss == 12 / 8
    assert trainer.progress.seconds == 2.5


def test_a_run_learns_the_glosses_of_its_clips(make: Callable[..., Trainer]) -> None:
    trainer = make("training.ctc_weight=1", "training.ctc_target=gloss", "training.epochs=20")
    batches = [batch for _, step in zip(range(2), batches_of(trainer), strict=False) for batch in step]

    def ctc_of_an_epoch() -> float:
        return sum(trainer._losses(batch)[1].item() for batch in batches)

    before = ctc_of_an_epoch()
    trainer.run(batches_of(trainer))
    assert ctc_of_an_epoch() < 0.8 * before
    evaluated = trainer.translate(trainer.corpus.splits["train"])
    assert evaluated.scores.gloss_wer is not None and "gloss_wer" in evaluated.line("cer")


def test_without_a_ctc_head_no_ctc_loss_is_logged(make: Callable[..., Trainer]) -> None:
    trainer = make()
    calls = watched(trainer, "tracker")
    trainer.step(next(batches_of(trainer)))
    assert "ctc_loss" not in calls.tracker.log.call_args.args[1]


@pytest.mark.parametrize("training", [True, False])
def test_labels_are_smoothed_in_training_alone(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    smoothing: list[float] = []
    monkeypatch.setattr(module, "batch_losses", lambda *_, label_smoothing, **__: smoothing.append(label_smoothing))
    trainer = make("training.label_smoothing=0.25")
    trainer.engine.module.train(training)
    trainer._losses(next(batches_of(trainer))[0])
    assert smoothing == [0.25 if training else 0]


def test_parts_of_a_step_have_their_order(make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("training.ema=0.9")
    stream = batches_of(trainer)
    first, second = next(stream), next(stream)
    calls = watched(trainer, "meter", "rank_watch", "gradient_guard")
    calls.engine.step.side_effect = trainer.engine.step
    trainer.engine.step = calls.engine.step
    monkeypatch.setattr(module, "update_average", calls.update_average)
    trainer.step(first)
    once = ["rank_watch.begin", "meter.begin", "meter.forward", "meter.forward"]
    once += [
        "gradient_guard.count",
        "gradient_guard.check",
        "engine.step",
        "update_average",
        "rank_watch.end",
        "meter.end",
    ]
    assert names_of(calls) == once
    calls.rank_watch.begin.assert_called_once_with(1)
    calls.update_average.assert_called_once_with(trainer.engine, 0.9, 1)
    trainer.step(second)
    assert names_of(calls)[len(once) :] == [name for name in once if not name.startswith("gradient_guard")]


def test_learning_rates_follow_the_schedule_and_are_logged(make: Callable[..., Trainer]) -> None:
    trainer = make("training.warmup_ratio=0.5")
    calls = watched(trainer, "tracker")
    stream = batches_of(trainer)
    peak = trainer.recipe.training.learning_rate
    peaks = [rate for _, rate in trainer.peaks]
    for step in range(3):
        trainer.step(next(stream))
        factor = scheduled_factor(trainer.recipe.training, step, trainer.total_steps, None)
        assert trainer.engine.rates[-1] == pytest.approx([rate * factor for rate in peaks])
        assert calls.tracker.log.call_args.args[1]["learning_rate"] == pytest.approx(peak * factor)
    assert trainer.engine.rates[0] != trainer.engine.rates[1]


def test_a_backbone_is_frozen_for_the_first_steps(make: Callable[..., Trainer]) -> None:
    trainer = make("training.freeze_backbone_steps=2")
    calls = watched(trainer, "freeze")
    stream = batches_of(trainer)
    of_backbone = [place for place, (name, _) in enumerate(trainer.peaks) if name == "backbone"]
    for step in range(4):
        trainer.step(next(stream))
        rates = [trainer.engine.rates[-1][place] for place in of_backbone]
        assert any(rates) == (step >= 2)
        assert calls.freeze.thaw.call_count == (step >= 2)
    assert of_backbone


@pytest.mark.parametrize(("step", "is_frozen"), [(1, True), (2, True), (3, False)])
def test_a_run_that_resumes_freezes_what_was_frozen(make: Callable[..., Trainer], step: int, is_frozen: bool) -> None:
    trainer = make("training.freeze_backbone_steps=2", progress=Progress(step=step))
    assert (trainer.freeze is not None) == is_frozen, "the step that thaws it needs it, too"


@pytest.mark.parametrize("is_main", [True, False])
def test_a_jump_of_the_loss_is_a_warning_of_rank_0(
    make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, is_main: bool
) -> None:
    trainer = make()
    calls = watched(trainer, "tracker", "line", "loss_spikes")
    if not is_main:
        trainer.ranks = replace(trainer.ranks, rank=1)
    calls.loss_spikes.see.return_value = "it jumped"
    trainer.step(next(batches_of(trainer)))
    assert calls.loss_spikes.see.call_args.args[:2] == (1, trainer.loss)
    assert calls.line.echo.called == is_main and ("it jumped" in caplog.text) == is_main
    event = {"args": (1, {"warning": "it jumped"}), "kwargs": {"kind": "event"}}
    logged = [{"args": call.args, "kwargs": call.kwargs} for call in calls.tracker.log.call_args_list]
    assert (event in logged) == is_main


def test_above_stage_0_the_norm_is_that_of_deepspeed(make: Callable[..., Trainer]) -> None:
    trainer = make("ds.zero_optimization.stage=1")
    norms: list[float] = []
    trainer._log_step = lambda speed, rate, norm, ctc: norms.append(norm)  # type: ignore[method-assign]
    trainer.step(next(batches_of(trainer)))
    assert norms == [123.0]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(make: Callable[..., Trainer]) -> None:
    trainer = make()
    batches = next(batches_of(trainer))
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    batches[1].poses[:] = math.inf
    with pytest.raises(TrainingStopped, match="step 1") as stopped:
        trainer.step(batches)
    listed = (trainer.resolved.run_dir / "not_finite_rank_00.txt").read_text().split()
    assert sorted(listed) == sorted(uid for batch in batches for uid in batch.uids)
    assert "training.learning_rate" in stopped.value.hint
    assert trainer.engine.steps == 0 and trainer.progress.step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.module.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_no_weight(make: Callable[..., Trainer]) -> None:
    """At stage 0 in fp32; DeepSpeed's own optimizers skip the step as well (tests/end_to_end/test_strategies.py)."""
    trainer = make("ds.zero_optimization.stage=0", "training.ema=0.5", "training.epochs=9")
    stream, warned = batches_of(trainer), watched(trainer, "line").line.echo
    trainer.step(next(stream))
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    states = [copy.deepcopy(state) for state in trainer.engine.optimizer.state.values()]
    handle = trainer.weights[0].register_hook(lambda gradient: gradient * math.nan)
    for _ in range(2):
        trainer.step(next(stream))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.module.state_dict().items())
    torch.testing.assert_close(list(trainer.engine.optimizer.state.values()), states, rtol=0, atol=0)
    assert (trainer.progress.step, trainer.engine.steps, trainer.engine.skipped_steps) == (3, 1, 2)
    ((text,),) = [call.args for call in warned.call_args_list]
    assert "step 2" in text, "once for several in a row"
    trainer.step(next(stream))
    values = trainer.engine.module.state_dict()
    assert all(value.isfinite().all() for value in values.values())
    assert any(not torch.equal(value, before[name]) for name, value in values.items())


def test_a_step_that_deepspeed_skips_leaves_the_average(make: Callable[..., Trainer]) -> None:
    """Its optimizer has no states yet, and one with an average in it would count as filled."""
    trainer = make("ds.zero_optimization.stage=1", "training.ema=0.5")
    trainer.engine.applies = False
    trainer.step(next(batches_of(trainer)))
    assert not any(trainer.engine.optimizer.state.values())


def test_clips_are_listed_by_the_rank_whose_loss_is_not_finite(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    batches = next(batches_of(trainer))
    counts = trainer.meter.begin(batches)
    monkeypatch.setattr(module.dist, "all_reduce", lambda sums: sums.fill_(math.nan))  # that of another rank
    with pytest.raises(TrainingStopped, match="step 1"):
        trainer._look_at_device(counts, torch.ones(2, dtype=torch.float64), batches)
    assert not list(trainer.resolved.run_dir.glob("not_finite*"))


def test_all_ranks_stop_where_one_is_requested_to(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    summed: list[float] = []

    def of_two_ranks(sums: torch.Tensor) -> None:
        if len(sums) == 4:  # not those of the meter
            summed.append(float(sums[2]))
            sums[2] += 1

    monkeypatch.setattr(module.dist, "all_reduce", of_two_ranks)
    assert trainer.step(next(batches_of(trainer))) is True
    assert summed == [0]
