"""A run directory holds one run: which, what became of it, and whether this command may go on with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training import run_directory

Resolve = Callable[..., ResolvedRun]


def test_a_run_that_starts_writes_down_what_it_is(resolve: Resolve, corpus: Corpus) -> None:
    resolved = resolve()
    run_directory.start(resolved, corpus.path)
    assert run_directory.read_status(resolved.run_dir) == "running"
    assert ResolvedRun.load(resolved.run_dir).deepspeed == resolved.deepspeed
    environment = json.loads((resolved.run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"]


def test_the_same_settings_may_go_on(resolve: Resolve, corpus: Corpus) -> None:
    run_directory.start(resolve(), corpus.path)
    run_directory.check_same_run(resolve())


@pytest.mark.parametrize(
    "override",
    [
        "training.save_every=7",
        "training.micro_batch_size=8",
        "tracking.wandb=offline",
        "deepspeed=zero3",
        "ds.wall_clock_breakdown=true",
    ],
)
def test_how_it_is_run_and_watched_may_change(resolve: Resolve, corpus: Corpus, override: str) -> None:
    run_directory.start(resolve(), corpus.path)
    run_directory.check_same_run(resolve(override))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.learning_rate=0.5", "training.learning_rate 0.001 -> 0.5"),
        ("training.global_batch_size=64", "training.global_batch_size 32 -> 64"),
        ("model.pose_encoder=linear", "model.pose_encoder.kind conv -> linear"),
        ("augmentation.noise=0", "augmentation.noise"),
    ],
)
def test_what_it_learns_may_not_change(resolve: Resolve, corpus: Corpus, override: str, told: str) -> None:
    run_directory.start(resolve(), corpus.path)
    with pytest.raises(UserError) as refusal:
        run_directory.check_same_run(resolve(override))
    message = str(refusal.value)
    assert told in message and "--new" in message and "run.dir" in message
    assert "\n" not in message


def test_an_empty_folder_is_free(resolve: Resolve) -> None:
    run_directory.check_same_run(resolve())
    assert run_directory.read_status(resolve().run_dir) is None


def test_setting_aside_never_loses_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(3):
        run.mkdir()
        (run / "notes").write_text(str(number))
        run_directory.set_aside(run)
    assert not run.exists()
    assert [(tmp_path / f"run.{number}" / "notes").read_text() for number in (1, 2, 3)] == ["0", "1", "2"]
    assert run_directory.set_aside(run) is None


def test_a_broken_status_is_one_line(tmp_path: Path) -> None:
    (tmp_path / run_directory.STATUS).write_text("{")
    with pytest.raises(UserError, match="--new"):
        run_directory.read_status(tmp_path)
