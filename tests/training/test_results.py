"""The scores of a finished run reach the user, also when they cannot be written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from toolkit.checkpointing.checkpoints import Progress
from toolkit.errors import UserError
from toolkit.evaluation.splits import SplitResult
from toolkit.recipe.resolve import ResolvedRun
from toolkit.scoring.metrics import score
from toolkit.scoring.predictions import make_predictions
from toolkit.training.results import format_summary, read_scores, write_scores

TEXTS = ["the sun is up", "rain falls"]


def result() -> SplitResult:
    scores = score(TEXTS, TEXTS)
    return SplitResult(make_predictions(["a", "b"], TEXTS, TEXTS), scores, {"random": scores})


def test_what_is_written_is_read_and_shown(resolve: Callable[..., ResolvedRun]) -> None:
    printed: list[str] = []
    resolved = resolve()
    summary = write_scores(resolved, Progress(step=3), {"test": result()}, 1.0, printed.append)
    assert read_scores(resolved.run_dir) == summary
    assert TEXTS[0] in format_summary(summary, samples=2, seed=0)
    assert not printed


@pytest.mark.parametrize("refused", ["predictions", "scores.json"])
def test_scores_that_cannot_be_written_are_printed(resolve: Callable[..., ResolvedRun], refused: str) -> None:
    printed: list[str] = []
    resolved = resolve()
    resolved.run_dir.mkdir(parents=True)
    obstacle = resolved.run_dir / refused
    obstacle.touch() if refused == "predictions" else obstacle.mkdir()
    with pytest.raises((OSError, UserError), match=refused):
        write_scores(resolved, Progress(step=3), {"test": result()}, 1.0, printed.append)
    assert "100.00" in printed[0]
