"""A model whose outputs are all alike is warned of."""

from __future__ import annotations

import pytest

from toolkit.recipe.schema import Evaluation
from toolkit.scoring.metrics import score
from toolkit.scoring.predictions import make_predictions
from toolkit.training.evaluating import Evaluated, collapse_warning

TEXTS = [f"text number {number}" for number in range(100)]


def warning_of(hypotheses: list[str], references: list[str], train_texts: list[str], select_by: str) -> str | None:
    settings = Evaluation(select_by=select_by)
    predictions = make_predictions(
        [str(n) for n in range(len(references))], references, hypotheses, [0.0] * len(references)
    )
    evaluated = Evaluated(predictions, score(hypotheses, references))
    return collapse_warning(evaluated, train_texts, 3, settings)


@pytest.mark.parametrize("distinct", [1, 5])
def test_few_different_outputs_are_reported(distinct: int) -> None:
    warning = warning_of([f"hello {number % distinct}" for number in range(100)], TEXTS, TEXTS, "bleu4")
    assert warning is not None and "\n" not in warning
    assert all(part in warning for part in ("epoch 3", f"{distinct} different", "100 clips", "--overfit"))


def test_the_score_of_one_constant_sentence_is_reported() -> None:
    """All outputs differ, and each has CER 1, as the constant sentence has."""
    hypotheses = [chr(0x4E00 + number) * 4 for number in range(100)]
    references = [f"ab{chr(0x905 + number)}z" for number in range(100)]
    warning = warning_of(hypotheses, references, ["####"], "cer")
    assert warning is not None and "cer 1" in warning
    assert warning_of([text + "!" for text in references], references, ["####"], "cer") is None


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        ([f"hello {number % 20}" for number in range(100)], TEXTS),
        (["yes"] * 100, ["yes"] * 100),  # all references are alike, so outputs may be
    ],
)
def test_outputs_that_differ_as_references_do_are_not_reported(hypotheses: list[str], references: list[str]) -> None:
    assert warning_of(hypotheses, references, ["a quite different sentence"], "chrf") is None
