"""Scores and sample outputs as plain text, for terminals and log files alike."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from toolkit.evaluation.metrics import SCORE_NAMES, Scores
from toolkit.evaluation.predictions import Prediction

HEADINGS = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "chrf": "chrF++",
    "rouge_l": "ROUGE-L",
    "wer": "WER",
    "cer": "CER",
}
NOT_APPLICABLE = "n/a"


def scores_table(rows: Mapping[str, Scores]) -> str:
    """A table with one row for each set of scores, then the settings that they were computed with.

    Args:
        rows: scores by label, in the order of printing; the model's first, then its floors.

    Returns:
        lines of text without a newline at the end; rows with the same settings share their signature.
    """
    table = [["", *(HEADINGS[name] for name in SCORE_NAMES), "clips"]]
    table += [
        [label, *(format_score(name, value) for name, value in scores.values().items()), str(scores.clips)]
        for label, scores in rows.items()
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for label, *cells in table:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *numbers]))
    lines.insert(1, "-" * len(lines[0]))
    signatures = {f"{name}: {text}": None for scores in rows.values() for name, text in scores.signature.items()}
    return "\n".join([*lines, *signatures])


def format_score(name: str, value: float | None) -> str:
    """A score as people print it: two decimals, four for the error rates, which are ratios."""
    if value is None:
        return NOT_APPLICABLE
    return f"{value:.4f}" if name in ("wer", "cer") else f"{value:.2f}"


def choose_samples(predictions: Sequence[Prediction], count: int, seed: int = 0) -> list[Prediction]:
    """Some predictions at random, in their own order; the same seed shows the same clips after every epoch."""
    chosen = random.Random(seed).sample(range(len(predictions)), min(count, len(predictions)))
    return [predictions[index] for index in sorted(chosen)]


def samples_text(predictions: Sequence[Prediction]) -> str:
    """Reference above hypothesis for each prediction, one blank line between them."""
    return "\n\n".join(
        f"{_one_line(item.uid)}\n  reference   {_one_line(item.reference)}\n  hypothesis  {_one_line(item.hypothesis)}"
        for item in predictions
    )


def _one_line(text: str) -> str:
    """Keep a text on its line, and its control characters away from the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
