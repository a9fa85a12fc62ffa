"""What --extend accepts and refuses, and where a run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.checkpointing import run_directory
from toolkit.checkpointing.checkpoints import Extension, Progress, SavedState
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.start import Start, extend_schedule, find_start

Resolve = Callable[..., ResolvedRun]
SHORT = ("training.global_batch_size=2", "training.micro_batch_size=2", "training.warmup_ratio=0.5")  # 3 steps an epoch


def start_of(resolved: ResolvedRun, step: int, **progress: Any) -> Start:
    recipe = resolved.recipe.model_dump(mode="json")
    state = SavedState(Progress(step=step, **progress), {}, "AdamW", recipe, {}, "", {})
    return Start(state.progress, Path("checkpoints/step"), state)


@pytest.fixture
def begun(resolve: Resolve, corpus: Corpus) -> ResolvedRun:
    """A run of four epochs, 12 steps, in its directory."""
    resolved = resolve(*SHORT, "training.epochs=4")
    run_directory.start(resolved, corpus)
    return resolved


def test_more_epochs_extend_the_schedule(begun: ResolvedRun, resolve: Resolve, corpus: Corpus) -> None:
    start = start_of(begun, 12)
    note = extend_schedule(resolve(*SHORT, "training.epochs=8"), corpus, start)
    assert note and "12 to 24 steps" in note
    assert start.progress.extension == Extension(step=12, ratio=0.0, warmup_steps=6)


def test_a_run_of_the_same_length_is_not_extended(begun: ResolvedRun, corpus: Corpus) -> None:
    start = start_of(begun, 12, evaluations_since_best=9)
    assert extend_schedule(begun, corpus, start) is None
    assert extend_schedule(begun, corpus, Start()) is None
    assert start.progress.extension is None


def test_a_started_extension_resumes_from_a_checkpoint_of_the_shorter_run(
    begun: ResolvedRun, resolve: Resolve, corpus: Corpus
) -> None:
    longer = resolve(*SHORT, "training.epochs=8")
    run_directory.start(longer, corpus)  # and it was killed before its first checkpoint
    run_directory.check_same_run(longer)
    run_directory.check_same_experiment(longer, begun.recipe.model_dump(mode="json"), Path("c"), extend=True)
    start = start_of(begun, 9)
    assert extend_schedule(longer, corpus, start)
    assert start.progress.extension and start.progress.extension.step == 9


@pytest.mark.parametrize(
    ("settings", "progress", "named", "key"),
    [
        (["training.epochs=2"], {}, ["after 6 steps", "12 of 12"], "training.epochs"),
        (["training.epochs=8", "training.max_steps=12"], {}, ["--extend", "12 steps"], "training.max_steps"),
        (
            ["training.epochs=8", "training.early_stopping=2"],
            {"evaluations_since_best": 2},
            ["--extend", "2 evaluations", "training.early_stopping=2"],
            "training.early_stopping",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused(
    begun: ResolvedRun,
    resolve: Resolve,
    corpus: Corpus,
    settings: list[str],
    progress: dict[str, Any],
    named: list[str],
    key: str,
) -> None:
    start = start_of(begun, 12, **progress)
    with pytest.raises(UserError) as refusal:
        extend_schedule(resolve(*SHORT, *settings), corpus, start)
    assert all(part in refusal.value.message for part in named)
    assert key in refusal.value.hint
    assert start.progress.extension is None


def test_a_run_that_stopped_early_resumes_with_more_patience(
    begun: ResolvedRun, resolve: Resolve, corpus: Corpus
) -> None:
    start = start_of(begun, 6, evaluations_since_best=2)
    assert extend_schedule(resolve(*SHORT, "training.epochs=4", "training.early_stopping=3"), corpus, start) is None


def test_without_extend_a_longer_run_is_refused_and_the_hint_names_it(begun: ResolvedRun, resolve: Resolve) -> None:
    for longer in ("training.epochs=8", "training.max_steps=99"):
        with pytest.raises(UserError, match=longer.partition("=")[0]) as refusal:
            find_start(resolve(*SHORT, "training.epochs=4", longer), "auto")
        assert "--extend" in refusal.value.hint
    other = resolve(*SHORT, "training.epochs=8", "training.seed=9")
    with pytest.raises(UserError, match=r"training.epochs 4.0 -> 8.0, training.seed 42 -> 9") as refusal:
        find_start(other, "auto")
    assert "--extend" not in refusal.value.hint
    with pytest.raises(UserError, match=r"\(training.seed 42 -> 9\)"):
        find_start(other, "auto", extend=True)


def test_a_finished_run_stays_finished_unless_it_is_extended(begun: ResolvedRun, resolve: Resolve) -> None:
    run_directory.write_status(begun.run_dir, "finished")
    assert find_start(begun, "auto").finished
    assert find_start(begun, "auto", extend=True).finished
    with pytest.raises(UserError, match="--extend") as refusal:
        find_start(resolve(*SHORT, "training.epochs=8"), "auto", extend=True)
    assert str(begun.run_dir) in refusal.value.message and "--new" in refusal.value.hint


@pytest.mark.parametrize("other", ["model.backbone=bart_large", "training.seed=9", "evaluation.num_beams=9"])
def test_a_finished_run_is_no_result_of_other_settings(begun: ResolvedRun, resolve: Resolve, other: str) -> None:
    run_directory.write_status(begun.run_dir, "finished")
    with pytest.raises(UserError, match=other.partition("=")[0]) as refusal:
        find_start(resolve(*SHORT, "training.epochs=4", other), "auto")
    assert str(begun.run_dir) in refusal.value.message and "--new" in refusal.value.hint


def test_there_must_be_a_run_to_extend(resolve: Resolve) -> None:
    with pytest.raises(UserError, match="--extend") as refusal:
        find_start(resolve(), "auto", extend=True)
    assert "run.dir" in refusal.value.hint
    assert find_start(resolve(), "auto") == Start()


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_failed_before_its_first_step_starts_with_other_settings(
    begun: ResolvedRun, resolve: Resolve, status: run_directory.Status
) -> None:
    run_directory.write_status(begun.run_dir, status)
    assert find_start(resolve("training.epochs=9", "training.seed=9"), "auto") == Start()
    assert not (begun.run_dir / run_directory.CORPUS_FILE).exists(), "its clips may be others, too"


@pytest.mark.parametrize("left", ["checkpoints/step_000002/state.json", "metrics.jsonl"])
def test_a_run_that_failed_later_keeps_its_settings(begun: ResolvedRun, resolve: Resolve, left: str) -> None:
    path = begun.run_dir / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"kind": "train", "step": 1}\n')
    run_directory.write_status(begun.run_dir, "failed")
    with pytest.raises(UserError, match=r"training.seed 42 -> 9"):
        find_start(resolve(*SHORT, "training.epochs=4", "training.seed=9"), "auto")
