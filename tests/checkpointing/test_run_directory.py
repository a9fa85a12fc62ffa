"""A run directory holds one run: its settings, its status, and whether this command may resume it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.checkpointing import run_directory
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.load import recipe_keys
from toolkit.recipe.resolve import ResolvedRun

Resolve = Callable[..., ResolvedRun]


def test_a_run_that_starts_writes_its_settings(resolve: Resolve, corpus: Corpus) -> None:
    resolved = resolve()
    run_directory.start(resolved, corpus)
    assert run_directory.read_status(resolved.run_dir) == "running"
    assert ResolvedRun.load(resolved.run_dir).deepspeed == resolved.deepspeed
    environment = json.loads((resolved.run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"]


def test_the_same_settings_may_resume(resolve: Resolve, corpus: Corpus) -> None:
    run_directory.start(resolve(), corpus)
    run_directory.check_same_run(resolve())


@pytest.mark.parametrize(
    "override",
    [
        "training.save_every=7",
        "training.micro_batch_size=8",
        "tracking.wandb=offline",
        "deepspeed=zero3",
        "ds.wall_clock_breakdown=true",
        "training.micro_batch_frames=900",
        "training.compile=false",
        "training.keep_best=3",
        "training.eval_every=2",
        "training.early_stopping=4",
        "evaluation.samples=3",
        "evaluation.graphs=false",
        "evaluation.batch_frames=100",
    ],
)
def test_settings_of_how_it_runs_may_change(resolve: Resolve, corpus: Corpus, override: str) -> None:
    run_directory.start(resolve(), corpus)
    run_directory.check_same_run(resolve(override))


@pytest.mark.parametrize(
    ("override", "listed"),
    [
        ("training.learning_rate=0.5", "training.learning_rate 0.001 -> 0.5"),
        ("training.global_batch_size=64", "training.global_batch_size 32 -> 64"),
        ("model.pose_encoder=linear", "model.pose_encoder.kind conv -> linear"),
        ("augmentation.noise=0", "augmentation.noise"),
        ("training.epochs=7", "training.epochs 10.0 -> 7.0"),
        ("evaluation.select_by=bleu4", "evaluation.select_by cer -> bleu4"),
        ("evaluation.tokenize=char", "evaluation.tokenize 13a -> char"),
        ("evaluation.lowercase=true", "evaluation.lowercase False -> True"),
        ("evaluation.max_new_tokens=3", "evaluation.max_new_tokens 32 -> 3"),
        ("evaluation.num_beams=9", "evaluation.num_beams"),
        ("evaluation.length_penalty=0.1", "evaluation.length_penalty"),
        ("evaluation.no_repeat_ngram_size=7", "evaluation.no_repeat_ngram_size"),
        ("data.fps=20", "data.fps"),
    ],
)
def test_settings_of_what_it_learns_and_of_how_the_best_is_chosen_may_not_change(
    resolve: Resolve, corpus: Corpus, override: str, listed: str
) -> None:
    run_directory.start(resolve(), corpus)
    with pytest.raises(UserError) as refusal:
        run_directory.check_same_run(resolve(override))
    assert listed in refusal.value.message
    assert "--new" in refusal.value.hint and "run.dir" in refusal.value.hint


def test_for_another_search_the_hint_names_evaluate(resolve: Resolve, corpus: Corpus) -> None:
    run_directory.start(resolve(), corpus)
    with pytest.raises(UserError) as refusal:
        run_directory.check_same_run(resolve("evaluation.num_beams=9"))
    assert "launch/evaluate.py" in refusal.value.hint
    with pytest.raises(UserError) as refusal:
        run_directory.check_same_run(resolve("evaluation.num_beams=9", "training.seed=9"))
    assert "evaluate.py" not in refusal.value.hint


def test_every_setting_that_may_change_exists() -> None:
    """A renamed key would be refused."""
    keys = recipe_keys()
    for name in (*run_directory.MAY_CHANGE, *run_directory.OF_PREPARATION):
        assert any(key == name or key.startswith(f"{name}.") for key in keys), name


def test_settings_of_preparation_have_no_effect_on_a_prepared_corpus(resolve: Resolve, corpus: Corpus) -> None:
    run_directory.start(resolve(), corpus)
    run_directory.check_same_run(resolve("data.source=table", f"data.corpus={corpus.path}", "data.fps=20"))


def test_an_empty_folder_is_free(resolve: Resolve) -> None:
    run_directory.check_same_run(resolve())
    assert run_directory.read_status(resolve().run_dir) is None


def test_archiving_never_loses_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(3):
        run.mkdir()
        (run / "notes").write_text(str(number))
        run_directory.archive_run(run)
    assert not run.exists()
    assert [(tmp_path / f"run.{number}" / "notes").read_text() for number in (1, 2, 3)] == ["0", "1", "2"]
    assert run_directory.archive_run(run) is None


def test_a_folder_that_is_no_run_is_not_archived(resolve: Resolve, corpus: Corpus) -> None:
    resolved = resolve()
    run_directory.check_archiving(resolved)
    resolved.run_dir.mkdir(parents=True)
    run_directory.check_archiving(resolved)
    (resolved.run_dir / "thesis.txt").write_text("of a user")
    with pytest.raises(UserError) as refusal:
        run_directory.check_archiving(resolved)
    assert str(resolved.run_dir) in refusal.value.message and "run.dir" in refusal.value.hint
    run_directory.start(resolved, corpus)
    run_directory.check_archiving(resolved)


def test_the_folder_of_a_corpus_is_no_run_directory(corpus: Corpus) -> None:
    with pytest.raises(UserError) as refusal:
        run_directory.check_same_corpus(corpus, corpus.path)
    assert str(corpus.path) in refusal.value.message and "run.dir" in refusal.value.hint


def test_what_the_new_run_reads_is_not_archived(resolve: Resolve, corpus: Corpus) -> None:
    run_dir = resolve().run_dir
    run_directory.start(resolve(), corpus)
    (run_dir / "best").mkdir()
    for source in (run_dir, run_dir / "best"):
        with pytest.raises(UserError, match=r"model\.init_from") as refusal:
            run_directory.check_archiving(resolve(f"model.init_from={source}"))
        assert "run.dir" in refusal.value.hint


def test_a_broken_status_is_refused(tmp_path: Path) -> None:
    (tmp_path / run_directory.STATUS).write_text("{")
    with pytest.raises(UserError, match=r"status\.json") as refusal:
        run_directory.read_status(tmp_path)
    assert "--new" in refusal.value.hint
