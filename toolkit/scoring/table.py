"""Scores, comparisons and sample outputs as plain text for terminals and log files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from toolkit.corpus.names import one_line
from toolkit.scoring.metrics import SCORE_NAMES, Scores, higher_is_better
from toolkit.scoring.predictions import Prediction
from toolkit.scoring.resampling import Comparison, Interval

HEADINGS = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "reduced_bleu": "rBLEU",
    "chrf": "chrF++",
    "rouge_l": "ROUGE-L",
    "wer": "WER",
    "cer": "CER",
    "gloss_wer": "gloss WER",
}
NOT_APPLICABLE = "n/a"
SOMETIMES = ("reduced_bleu", "gloss_wer")  # scores that have a column only where some row has them
# A difference with a p-value below this is significant.
SIGNIFICANT = 0.05


def scores_table(rows: Mapping[str, Scores], intervals: Mapping[str, Mapping[str, Interval]] | None = None) -> str:
    """A table with one row for each set of scores, then the settings that they were computed with.

    Args:
        rows: scores by label, in the order of printing; the model's first, then its floors.
        intervals: of some of these rows the 95 % intervals, by score; they go below their row.

    Returns:
        lines of text without a newline at the end; rows with the same settings share their signature. Reduced BLEU and
        the error rate of glosses have a column only where some row has them.
    """
    names = [
        name
        for name in SCORE_NAMES
        if name not in SOMETIMES or any(getattr(row, name) is not None for row in rows.values())
    ]
    table = [["", *(HEADINGS[name] for name in names), "clips"]]
    for label, scores in rows.items():
        values = scores.values()
        table.append([label, *(format_score(name, values[name]) for name in names), str(scores.clips)])
        ranges = (intervals or {}).get(label)
        for place, end in enumerate(("from", "to") if ranges else ()):
            bounds = [(ranges or {}).get(name) for name in names]
            cells = [
                format_score(name, bound[place]) if bound else "" for name, bound in zip(names, bounds, strict=True)
            ]
            table.append([f"  95 % {end}", *cells, ""])
    signatures = {f"{name}: {text}": None for scores in rows.values() for name, text in scores.signature.items()}
    return "\n".join([*_aligned(table), *signatures])


def comparison_table(first: str, second: str, comparisons: Mapping[str, Comparison]) -> str:
    """Two sets of translations score by score: difference, its 95 % interval and p-value."""
    table = [["", first, second, "difference", "95 % from", "to", "p", ""]]
    for name in SCORE_NAMES:
        if name in comparisons:
            item = comparisons[name]
            values = (item.first, item.second, item.difference, *item.interval)
            cells = [format_score(name, value) for value in values]
            table.append([HEADINGS[name], *cells, f"{item.p_value:.3f}", verdict(name, item, first, second)])
    longest = max(len(row[-1]) for row in table)
    return "\n".join(_aligned([[*row[:-1], row[-1].ljust(longest)] for row in table]))


def _aligned(table: list[list[str]]) -> list[str]:
    """Lines of a table, its first column to the left and the others to the right, with a rule below the headings."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for label, *cells in table:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *numbers]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def verdict(name: str, comparison: Comparison, first: str, second: str) -> str:
    """Which of the two is better, if the difference is significant."""
    if comparison.p_value >= SIGNIFICANT or comparison.difference == 0:
        return "no difference shown"
    return f"{second if (comparison.difference > 0) == higher_is_better(name) else first} is better"


def format_score(name: str, value: float | None) -> str:
    """A score with two decimals, the error rates with four, because they are ratios."""
    if value is None:
        return NOT_APPLICABLE
    return f"{value:.4f}" if name in ("wer", "cer", "gloss_wer") else f"{value:.2f}"


def choose_samples(predictions: Sequence[Prediction], count: int, seed: int = 0) -> list[Prediction]:
    """Some predictions at random, in their own order; the same seed shows the same clips after every epoch."""
    chosen = random.Random(seed).sample(range(len(predictions)), min(count, len(predictions)))
    return [predictions[index] for index in sorted(chosen)]


def samples_text(predictions: Sequence[Prediction]) -> str:
    """Reference above hypothesis for each prediction, one blank line between them."""
    return "\n\n".join(
        f"{one_line(item.uid)}\n  reference   {one_line(item.reference)}\n  hypothesis  {one_line(item.hypothesis)}"
        for item in predictions
    )
