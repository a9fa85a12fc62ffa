"""best/ is always the best model, and as many runners-up as asked for are kept beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.evaluation.metrics import Scores, score
from toolkit.training.best_models import EVALUATION, Kept, admit, place_model

REFERENCE = "the quick brown fox jumps over the lazy dog"


def scores(right_words: int) -> Scores:
    words = REFERENCE.split()
    return score([" ".join([*words[:right_words], *("x" for _ in words[right_words:])])], [REFERENCE])


def writer(text: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model").write_text(text)

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


def test_a_run_that_evaluates_a_step_again_keeps_it_once(tmp_path: Path) -> None:
    kept = evaluate(tmp_path, [], 10, 5, keep=3)
    evaluate(tmp_path, kept, 20, 8, keep=3)  # and dies before its checkpoint
    kept = evaluate(tmp_path, kept, 20, 8, keep=3)
    assert models(tmp_path) == {"best": "20", "best_000010": "10"}
    kept = evaluate(tmp_path, kept, 20, 8, keep=3)
    assert [step for step, _ in kept] == [20, 10]
    assert models(tmp_path) == {"best": "20", "best_000010": "10"}


def test_a_score_that_is_not_there_loses_to_any(tmp_path: Path) -> None:
    nothing = score([], [])
    kept = admit([], 10, nothing, select_by="bleu4", keep=2)
    kept = admit(kept, 20, scores(9), select_by="bleu4", keep=2)
    assert [step for step, _ in kept] == [20, 10]
    assert admit(kept, 30, nothing, select_by="bleu4", keep=3)[-1][0] == 30


def test_a_model_that_cannot_be_written_costs_no_other(tmp_path: Path) -> None:
    kept = evaluate(tmp_path, [], 10, 5, keep=1)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    better = admit(kept, 20, scores(9), select_by="bleu4", keep=1)
    with pytest.raises(UserError, match=r"step 20 cannot be written .*No space left"):
        place_model(tmp_path, better, 20, scores(9), full)
    assert models(tmp_path) == {"best": "10"}
