"""best/ is the best model at any time, and training.keep_best - 1 runners-up are kept beside it."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.checkpointing.kept_models import EVALUATION, Kept, admit, keep_only, place_model, restore_models, step_of
from toolkit.errors import UserError
from toolkit.scoring.metrics import Scores, score

REFERENCE = "the quick brown fox jumps over the lazy dog"


@functools.cache
def scores(right_words: int) -> Scores:
    words = REFERENCE.split()
    return score([" ".join([*words[:right_words], *("x" for _ in words[right_words:])])], [REFERENCE])


def writer(text: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        partial = folder.with_name(f".{folder.name}.partial")  # as save_model does
        partial.mkdir()
        (partial / "model").write_text(text)
        partial.rename(folder)

    return save


def models(run_dir: Path) -> dict[str, str]:
    return {path.name: (path / "model").read_text() for path in sorted(run_dir.iterdir())}


def evaluate(run_dir: Path, kept: Kept, step: int, right_words: int, keep: int, select_by: str = "bleu4") -> Kept:
    found = scores(right_words)
    kept = admit(kept, step, found, select_by=select_by, keep=keep)
    if step in dict(kept):
        place_model(run_dir, kept, step, found, writer(str(step)))
    return kept


def test_one_model_is_kept(tmp_path: Path) -> None:
    kept: Kept = []
    for step, right_words in ((10, 5), (20, 8), (30, 6), (40, 8)):
        kept = evaluate(tmp_path, kept, step, right_words, keep=1)
    assert models(tmp_path) == {"best": "20"}  # of equals the older
    assert json.loads((tmp_path / "best" / EVALUATION).read_text())["step"] == 20


@pytest.mark.parametrize("select_by", ["bleu4", "wer"])
def test_runners_up_are_kept_beside_it(tmp_path: Path, select_by: str) -> None:
    kept: Kept = []
    seen = []
    for step, right_words in ((10, 5), (20, 8), (30, 6), (40, 4), (50, 9)):
        kept = evaluate(tmp_path, kept, step, right_words, keep=3, select_by=select_by)
        seen.append(models(tmp_path))
    assert seen == [
        {"best": "10"},
        {"best": "20", "best_000010": "10"},
        {"best": "20", "best_000010": "10", "best_000030": "30"},
        {"best": "20", "best_000010": "10", "best_000030": "30"},
        {"best": "50", "best_000020": "20", "best_000030": "30"},
    ]


def test_no_score_is_worse_than_any_score(tmp_path: Path) -> None:
    nothing = score([], [])
    kept = admit([], 10, nothing, select_by="bleu4", keep=2)
    kept = admit(kept, 20, scores(9), select_by="bleu4", keep=2)
    assert [step for step, _ in kept] == [20, 10]
    assert admit(kept, 30, nothing, select_by="bleu4", keep=3)[-1][0] == 30


def test_a_model_that_cannot_be_written_leaves_the_others_intact(tmp_path: Path) -> None:
    kept = evaluate(tmp_path, [], 10, 5, keep=1)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    better = admit(kept, 20, scores(9), select_by="bleu4", keep=1)
    with pytest.raises(UserError, match=f"step 20 .*{os.strerror(errno.ENOSPC)}"):
        place_model(tmp_path, better, 20, scores(9), full)
    assert models(tmp_path) == {"best": "10"}


def test_a_model_that_a_checkpoint_lists_stays_until_no_checkpoint_lists_it(tmp_path: Path) -> None:
    kept = evaluate(tmp_path, [], 10, 5, keep=1)
    better = admit(kept, 20, scores(8), select_by="bleu4", keep=1)
    place_model(tmp_path, better, 20, scores(8), writer("20"), in_checkpoints=[10])
    assert models(tmp_path) == {"best": "20", "best_000010": "10"}
    keep_only(tmp_path, [20])
    assert models(tmp_path) == {"best": "20"}


def test_a_run_that_resumes_from_an_older_checkpoint_archives_newer_models(tmp_path: Path) -> None:
    kept: Kept = []
    for step, right_words in ((10, 5), (20, 6), (30, 8), (40, 4)):
        kept = evaluate(tmp_path, kept, step, right_words, keep=9)
    assert restore_models(tmp_path, [(10, 1.0), (5, 0.5)], step=15, newest=30) == [(10, 1.0)]
    assert models(tmp_path) == {"best": "10", "best_000020.aside_1": "20", "best_000030.aside_1": "30"}


def test_a_best_model_without_a_step_is_left_alone(tmp_path: Path) -> None:
    writer("mine")(tmp_path / "best")
    with pytest.raises(UserError, match=r"best/evaluation\.json") as refusal:
        restore_models(tmp_path, [], step=0, newest=0)
    assert f"move {tmp_path / 'best'} away" in refusal.value.hint
    assert models(tmp_path) == {"best": "mine"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Killer:
    """Kills before or after the n-th operation that changes the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.deadline, self.after = 0, -1, False
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            dies = self.count == self.deadline
            if dies and not self.after:
                raise Killed
            done = operation(*arguments, **options)
            if dies:
                raise Killed
            return done

        return counted


class Run:
    """A run that only evaluates and saves; its folder and its last checkpoint survive a kill."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.checkpoint: tuple[int, Kept] = (0, [])

    def resume(self, right_words: dict[int, int], saved: set[int]) -> Kept:
        """Run from the last checkpoint to the end.

        Args:
            right_words: how good the model of each step is.
            saved: steps with a checkpoint.
        """
        step, listed = self.checkpoint
        kept = restore_models(self.run_dir, listed, step, step)
        assert kept == listed, "a model that the checkpoint lists is gone"
        for now in (step for step in right_words if step > self.checkpoint[0]):
            found = scores(right_words[now])
            kept = admit(kept, now, found, select_by="bleu4", keep=self.keep)
            if now in dict(kept):
                steps = dict(self.checkpoint[1])
                place_model(self.run_dir, kept, now, found, writer(f"{now}: {right_words[now]}"), in_checkpoints=steps)
            if now in saved:
                self.checkpoint = now, kept
        keep_only(self.run_dir, dict(kept))
        return kept


FIRST = {10: 4, 20: 7, 30: 5, 40: 8, 50: 6}


@pytest.mark.parametrize("again", [FIRST, {10: 5, 20: 4, 30: 4, 40: 4, 50: 4}], ids=["the same", "worse"])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("saved", [{20, 50}, {10, 30, 50}, {50}], ids=str)
def test_after_a_kill_at_any_operation_the_best_model_is_that_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: dict[int, int], keep: int, saved: set[int]
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    killer = Killer(monkeypatch)
    Run(tmp_path, keep).resume(FIRST, saved)
    operations = killer.count
    assert operations > 10
    for deadline, after in itertools.product(range(1, operations + 1), (False, True)):
        folder = tmp_path / f"{deadline}{after}"
        killer.deadline = -1
        folder.mkdir()
        run = Run(folder, keep)
        killer.count, killer.deadline, killer.after = 0, deadline, after
        with contextlib.suppress(Killed):
            run.resume(FIRST, saved)
        killer.deadline = -1
        assert all((path / "model").exists() for path in folder.glob("best*")), "an incomplete model has its name"
        listed = run.checkpoint[1]
        kept = run.resume(again, saved)
        values = {step: FIRST[step] if step in dict(listed) else again[step] for step, _ in kept}
        best = kept[0][0]
        names = {step: "best" if step == best else f"best_{step:06d}" for step in values}
        assert models(folder) == {names[step]: f"{step}: {value}" for step, value in values.items()}, (deadline, after)
        assert step_of(folder / "best") == best and max(values.values()) == values[best]
