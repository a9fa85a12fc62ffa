"""The results of an evaluation: a summary for ``scores.json``, prediction files, and the table for the terminal."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from toolkit.corpus.packed import Corpus
from toolkit.evaluation.splits import SplitResult
from toolkit.files import write_text_atomically
from toolkit.scoring.floors import FLOOR_LABELS
from toolkit.scoring.groups import GROUPED_BY
from toolkit.scoring.metrics import Scores
from toolkit.scoring.neural import NeuralMetrics, neural_score
from toolkit.scoring.predictions import write_predictions
from toolkit.scoring.table import HEADINGS, SIGNIFICANT, scores_table

SCORES = "scores.json"
MOST_GROUPS = 12  # rows of the terminal's table of one kind; scores.json has all
# The scores that the control is judged by; the first that is applicable, because BLEU-4 needs texts of four words.
CONTROL_SCORES = ("bleu4", "chrf")


def summarise(
    model: str | Path,
    corpus: Corpus,
    out: Path,
    results: dict[str, SplitResult],
    clips_per_second: float,
    neural: NeuralMetrics,
) -> dict[str, Any]:
    """The content of ``scores.json``; its ``scores`` are those of the first split."""
    main = next(iter(results))
    splits = {name: _split_summary(result, neural) for name, result in results.items()}
    return {
        "model": str(model),
        "corpus": str(corpus.path),
        "out": str(out),
        "clips_per_second": round(clips_per_second, 2),
        "split": main,
        "scores": splits[main]["scores"],
        "floors": splits[main]["floors"],
        "intervals": splits[main]["intervals"],
        "signature": results[main].scores.signature,
        "splits": splits,
    }


def _split_summary(result: SplitResult, neural: NeuralMetrics) -> dict[str, Any]:
    texts = [row.hypothesis for row in result.predictions], [row.reference for row in result.predictions]
    return {
        **result.summary(),
        "neural": {name: neural_score(neural, name, *texts) for name in neural.checkpoints},
        "against_control": {name: asdict(item) for name, item in result.against_control.items()},
    }


def write_results(out: Path, summary: dict[str, Any], results: dict[str, SplitResult]) -> None:
    """Write ``scores.json``, one predictions file a split, and an n-best file where clips have several hypotheses.

    Raises:
        UserError, OSError: the folder cannot be written.
    """
    for name, result in results.items():
        write_predictions(out / f"{name}.csv", result.predictions)
        if result.n_best and len(result.n_best[0]) > 1:
            _write_n_best(out / f"{name}_n_best.csv", result)
        if result.n_best and result.n_best[0][0].gloss is not None:
            _write_glosses(out / f"{name}_glosses.csv", result)
    write_text_atomically(out / SCORES, json.dumps(summary, indent=2) + "\n")


def _write_n_best(path: Path, result: SplitResult) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(["uid", "place", "hypothesis", "score"])
        for row, found in zip(result.predictions, result.n_best, strict=True):
            for place, item in enumerate(found, start=1):
                writer.writerow([row.uid, place, item.text.replace("\0", " "), item.score])


def _write_glosses(path: Path, result: SplitResult) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(["uid", "glosses"])
        writer.writerows(
            [row.uid, found[0].gloss] for row, found in zip(result.predictions, result.n_best, strict=True)
        )


def format_results(results: dict[str, SplitResult]) -> str:
    """The table of scores with floors and intervals, the verdict of the control, and the scores of groups of clips."""
    rows: dict[str, Scores] = {}
    verdicts = []
    for name, result in results.items():
        rows[name] = result.scores
        rows |= {f"{name}, {FLOOR_LABELS[kind]}": scores for kind, scores in result.floors.items()}
        verdicts.append(f"{name}: {control_verdict(result)}")
    intervals = {name: result.intervals for name, result in results.items()}
    return "\n".join([scores_table(rows, intervals), "", *verdicts, *_format_groups(results)])


def _format_groups(results: dict[str, SplitResult]) -> list[str]:
    """A table for each split and kind of groups."""
    tables = []
    for name, result in results.items():
        for kind, groups in result.groups.items():
            shown = {group: replace(scores, signature={}) for group, scores in list(groups.items())[:MOST_GROUPS]}
            more = f", the {MOST_GROUPS} largest of {len(groups)}" if len(groups) > MOST_GROUPS else ""
            tables += ["", f"{name}, by {GROUPED_BY[kind]}{more}", scores_table(shown)]
    return tables


def control_verdict(result: SplitResult) -> str:
    """Whether the model uses the signing at all, in one line."""
    name = next((name for name in CONTROL_SCORES if name in result.against_control), None)
    if name is None:
        return "no score is applicable that would show whether the model looks at the signing"
    item = result.against_control[name]
    gain = f"{HEADINGS[name]} {item.second:.2f}, on the poses of other clips {item.first:.2f} (p = {item.p_value:.3f})"
    if item.difference > 0 and item.p_value < SIGNIFICANT:
        return f"{gain}: the model looks at the signing"
    return f"{gain}: nothing shows that the model looks at the signing"
