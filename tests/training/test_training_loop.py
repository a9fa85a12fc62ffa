"""The training loop with an engine of plain torch: when it evaluates, keeps models, saves and ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.small_trainers import Stops, batches_of, group, make, names_of, watched
from toolkit.checkpointing.checkpoints import Progress
from toolkit.checkpointing.kept_models import models_in
from toolkit.errors import Interrupted
from toolkit.scoring.metrics import score
from toolkit.scoring.predictions import make_predictions
from toolkit.training import trainer as module
from toolkit.training.evaluating import Evaluated
from toolkit.training.trainer import Trainer

__all__ = ["group", "make"]


def test_a_request_to_stop_saves_the_step_and_ends_the_run(make: Callable[..., Trainer]) -> None:
    trainer = make(interruptions=Stops(after=2))
    with pytest.raises(Interrupted, match=r"SIGTERM .*step 2 .*\b6$"):
        trainer.run(batches_of(trainer))
    assert trainer.checkpoints.saved == [2] and trainer.checkpoints.waits == 1  # type: ignore[attr-defined]


def test_a_request_in_the_last_step_does_not_interrupt(make: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make("training.max_steps=2", interruptions=Stops(after=2))
    trainer.run(batches_of(trainer))
    assert trainer.checkpoints.saved == [2]  # type: ignore[attr-defined]
    assert trainer.progress.kept == [(2, None)], "without a dev split the last model is kept"
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_a_target_loss_ends_the_run(make: Callable[..., Trainer]) -> None:
    trainer = make(target_loss=math.inf)
    trainer.run(batches_of(trainer))
    assert trainer.progress.step == trainer.total_steps == 1


def test_evaluations_without_a_better_one_end_the_run(make: Callable[..., Trainer]) -> None:
    trainer = make("training.early_stopping=2", "training.eval_every=1")
    trainer.corpus.splits["dev"] = trainer.corpus.splits["test"]
    trainer.progress.kept = [(1, 0.5)]

    def evaluate() -> None:
        trainer.progress.evaluations_since_best += 1

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    trainer.run(batches_of(trainer))
    assert (trainer.progress.step, trainer.progress.epoch) == (4, 1), "two epochs of two steps, of three"
    assert trainer.checkpoints.saved == [4]  # type: ignore[attr-defined]
    assert trainer.progress.kept == [(1, 0.5)]


def test_leaving_a_trainer_closes_what_was_opened_for_it(make: Callable[..., Trainer]) -> None:
    closed: list[str] = []
    with make() as trainer:
        trainer.on_exit.callback(closed.append, "first")
        trainer.on_exit.callback(closed.append, "last")
        assert closed == []
    assert closed == ["last", "first"]


def test_a_request_to_another_rank_is_named(make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    look = trainer._look_at_device

    def with_request(*arguments: Any) -> Any:
        counts, (nll, ctc, _), norm = look(*arguments)
        return counts, [nll, ctc, 1.0], norm

    monkeypatch.setattr(trainer, "_look_at_device", with_request)
    with pytest.raises(Interrupted, match=r"another .*step 1 "):
        trainer.run(batches_of(trainer))


def test_a_run_saves_every_few_steps_and_at_its_end(make: Callable[..., Trainer]) -> None:
    trainer = make("training.save_every=2", "training.max_steps=5", target_loss=-1.0)
    trainer.run(batches_of(trainer))
    checkpoints: Any = trainer.checkpoints
    assert checkpoints.saved == [2, 4, 5] and checkpoints.waits == 1
    assert checkpoints.kept == [[], [], [(5, None)]], "the last checkpoint lists the last model"
    progress = trainer.progress
    assert (progress.step, progress.epoch, progress.epoch_step) == (5, 2, 1)


@pytest.mark.parametrize(
    ("overrides", "evaluated"),
    [
        (("training.eval_every=1",), [2, 4, 6]),
        (("training.eval_every=2",), [4, 6]),
        (("training.eval_every=1", "training.max_steps=3"), [2, 3]),
    ],
)
def test_the_dev_split_is_evaluated_at_epochs_ends_and_at_the_last_step(
    make: Callable[..., Trainer], overrides: tuple[str, ...], evaluated: list[int]
) -> None:
    trainer = make(*overrides)
    trainer.corpus.splits["dev"] = trainer.corpus.splits["test"]
    steps: list[int] = []
    trainer.evaluate = lambda: steps.append(trainer.progress.step)  # type: ignore[method-assign]
    trainer.progress.kept = [(1, 0.5)]
    trainer.run(batches_of(trainer))
    assert steps == evaluated


REFERENCES = ["the red door", "a green stone"]


def evaluations(trainer: Trainer, *hypotheses: str) -> list[Any]:
    """Evaluate after step 1, 2, ... where each clip got the hypothesis of that step; gives the steps that were kept."""
    saved: list[Any] = []
    trainer.save_model = lambda kept, scores: saved.append(kept[:])  # type: ignore[method-assign]
    trainer.corpus.splits["dev"] = trainer.corpus.splits["test"]
    for hypothesis in hypotheses:
        trainer.progress.step += 1
        texts = [hypothesis] * len(REFERENCES)
        predictions = make_predictions(["a", "b"], REFERENCES, texts)
        evaluated = Evaluated(predictions, score(texts, REFERENCES))
        trainer.translate = lambda split, evaluated=evaluated: evaluated  # type: ignore[method-assign, misc]
        trainer.evaluate()
        trainer.since_best.append(trainer.progress.evaluations_since_best)  # type: ignore[attr-defined]
    return saved


def test_models_are_kept_by_their_score(make: Callable[..., Trainer]) -> None:
    trainer = make("training.keep_best=2", "evaluation.select_by=wer")
    trainer.since_best = []  # type: ignore[attr-defined]
    calls = watched(trainer, "tracker", "line", "rank_watch", "meter")
    trainer.progress.epoch = 3
    saved = evaluations(trainer, "nothing", "the red door", "no", "the door")
    assert [[step for step, _ in kept] for kept in saved] == [[1], [2, 1], [2, 4]], "step 3 is not among the best two"
    assert [step for step, _ in trainer.progress.kept] == [2, 4]
    assert trainer.since_best == [0, 0, 1, 2]  # type: ignore[attr-defined]
    assert [name for name in names_of(calls) if name.startswith(("rank", "meter"))] == [
        "rank_watch.paused",
        "meter.restart",
    ] * 4
    echoed = [call.args[0] for call in calls.line.echo.call_args_list if "dev after epoch 4" in call.args[0]]
    assert [("best wer" in line) for line in echoed] == [True, True, False, False]
    assert (trainer.resolved.run_dir / "predictions" / "predictions_epoch_004.csv").is_file()
    kinds = [call.kwargs.get("kind") for call in calls.tracker.log.call_args_list]
    assert kinds.count("eval") == 4 and calls.tracker.table.call_count == 4
    assert "dev_wer" in calls.tracker.log.call_args_list[0].args[1]


def test_another_rank_writes_no_predictions(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.since_best = []  # type: ignore[attr-defined]
    trainer.ranks = replace(trainer.ranks, rank=1)
    calls = watched(trainer, "tracker", "line")
    assert evaluations(trainer, "nothing"), "all ranks save a model together"
    assert not (trainer.resolved.run_dir / "predictions").exists() and not calls.tracker.table.called


@pytest.mark.parametrize("is_averaged", [True, False])
def test_averaged_weights_are_evaluated_and_kept(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, is_averaged: bool
) -> None:
    trainer = make(*(["training.ema=0.9"] if is_averaged else []))
    calls = watched(trainer)
    calls.saved_state_dict.return_value = {}
    for name in ("averaged_weights", "evaluate_split", "saved_state_dict", "place_model"):
        monkeypatch.setattr(module, name, getattr(calls, name))
    inside: list[bool] = []
    entered = calls.averaged_weights.return_value.__enter__
    left = calls.averaged_weights.return_value.__exit__
    for name in ("evaluate_split", "saved_state_dict"):
        getattr(calls, name).side_effect = lambda *_, **__: inside.append(entered.call_count > left.call_count)
    trainer.translate(trainer.corpus.splits["test"])
    trainer.save_model([(1, None)], None)
    assert inside == [is_averaged, is_averaged]
    assert calls.place_model.call_args.kwargs["in_checkpoints"] == {7}, "models of checkpoints stay"


def test_patience_that_is_over_ends_a_run_that_resumes(make: Callable[..., Trainer]) -> None:
    progress = Progress(step=2, epoch_step=2, kept=[(1, 0.5)], evaluations_since_best=2)
    trainer = make("training.early_stopping=2", progress=progress)
    assert trainer.total_steps == 2
    trainer.corpus.splits["dev"] = trainer.corpus.splits["test"]
    calls = watched(trainer, "line", "rank_watch")
    trainer.run(batches_of(trainer))
    trainer._stop_early()
    assert trainer.progress.step == 2 and not calls.line.echo.called, "at its last step a run does not stop early"


def test_without_a_dev_split_the_last_model_replaces_an_earlier_one(make: Callable[..., Trainer]) -> None:
    """An extended run."""
    trainer = make("training.max_steps=3", progress=Progress(step=2, epoch_step=2, kept=[(2, None)]))
    trainer.run(batches_of(trainer))
    assert trainer.progress.kept == [(3, None)]
    assert list(models_in(trainer.resolved.run_dir)) == [3]


def test_a_run_that_resumes_at_its_end_has_a_model(make: Callable[..., Trainer], tmp_path: Path) -> None:
    """It was killed between its last checkpoint and its last model."""
    trainer = make("training.max_steps=2", progress=Progress(step=2, epoch_step=2))
    (tmp_path / "run" / "best_000001").mkdir(parents=True)
    trainer.run(batches_of(trainer))
    assert trainer.progress.kept == [(2, None)]
    assert list(models_in(trainer.resolved.run_dir)) == [2], "models that are not kept are removed"


def test_ranks_are_watched_from_the_first_step_to_the_last(make: Callable[..., Trainer]) -> None:
    trainer = make("training.max_steps=1")
    trainer.engine.module.eval()
    calls = watched(trainer, "rank_watch", "meter")
    trainer.run(batches_of(trainer))
    assert trainer.engine.training
    own = ["rank_watch.start", "meter.restart", "rank_watch.waiting_for_data", "rank_watch.begin", "rank_watch.end"]
    assert [name for name in names_of(calls) if name in own] == [*own, *["meter.restart"] * 2]
    assert names_of(calls)[-1] == "rank_watch.close"


def test_a_failed_run_is_not_watched_any_longer(make: Callable[..., Trainer]) -> None:
    trainer = make()
    calls = watched(trainer, "rank_watch")
    trainer._run = lambda stream: math.sqrt(-1)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ValueError, match="domain"):
        trainer.run(batches_of(trainer))
    assert names_of(calls) == ["rank_watch.start", "rank_watch.close"]
