"""Evaluate a saved model on a corpus: find both, see that they fit each other, write down what came of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.cluster.rendezvous import on_rank_0
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import ensure_corpus
from toolkit.errors import UserError
from toolkit.evaluation.splits import SplitResult, splits_to_test
from toolkit.files import write_text_atomically
from toolkit.models.processor import PoseProcessor
from toolkit.poses.landmarks import LandmarkSet
from toolkit.recipe.load import load_recipe
from toolkit.recipe.schema import Evaluation, Recipe
from toolkit.scoring.addends import frequent_words, measure
from toolkit.scoring.floors import FLOOR_LABELS
from toolkit.scoring.metrics import Scores
from toolkit.scoring.neural import NeuralMetrics, neural_score
from toolkit.scoring.predictions import Prediction, read_predictions, write_predictions
from toolkit.scoring.resampling import Comparison, compare
from toolkit.scoring.table import HEADINGS, SIGNIFICANT, comparison_table, scores_table

RECIPE, ENVIRONMENT, SCORES = "recipe.yaml", "environment.json", "scores.json"
# Scores that say whether a model looks at the signing, the first of them that is applicable: where words are single,
# BLEU has nothing to count.
CONTROL_SCORES = ("bleu4", "chrf")


def recipe_of(model: str | Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe of the run that a model came from, or None for a model that lies elsewhere.

    Args:
        model: a run directory or a model folder; the ``best/`` of a run knows its run.
        overrides: ``key=value``, applied to the recipe.

    Raises:
        UserError: a key is unknown, or a value out of bounds.
    """
    run = run_of(model)
    return load_recipe(str(run / RECIPE), overrides) if run else None


def run_of(model: str | Path) -> Path | None:
    """The run directory of a model, if it lies in one."""
    path = Path(model)
    return next((place for place in (path, path.parent) if (place / RECIPE).is_file()), None)


def evaluation_settings(recipe: Recipe | None, overrides: Sequence[str]) -> Evaluation:
    """How to evaluate: as the run did, else the defaults; ``evaluation.key=value`` changes either.

    Raises:
        UserError: an override is not one of ``evaluation.``.
    """
    others = [item for item in overrides if not item.startswith("evaluation.")]
    if others:
        raise UserError(f"{others[0]}: a model that is trained has only settings of evaluation.* left to change")
    if recipe is not None:
        return recipe.evaluation
    return load_recipe(
        "demo", [f"evaluation.{key}={json.dumps(value)}" for key, value in Evaluation()] + list(overrides)
    ).evaluation


def open_corpus(model: str | Path, recipe: Recipe | None, corpus: str | None, *, is_local_main: bool) -> Corpus:
    """The corpus that was asked for, else the one that the model was trained on; all ranks call this.

    Raises:
        UserError: there is none.
    """
    if corpus:
        return Corpus.open(corpus)
    run = run_of(model)
    if recipe is None or run is None:
        raise UserError(f"{model} lies in no run directory, so its corpus is not known: add --corpus FOLDER")
    place = on_rank_0(lambda: _corpus_of(run, recipe))
    return Corpus.open(place or ensure_corpus(recipe.data, is_local_main=is_local_main))


def _corpus_of(run: Path, recipe: Recipe) -> Path | None:
    """The corpus that a run was trained on, where it still lies there."""
    try:
        trained_on = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8")).get("corpus")
    except (OSError, ValueError):
        trained_on = None
    return next((Path(path) for path in (trained_on, recipe.data.corpus) if path and Path(path).is_dir()), None)


def check_fit(corpus: Corpus, processor: PoseProcessor) -> None:
    """Refuse a corpus whose features mean something else than the model learnt.

    Raises:
        UserError: landmarks, frame rate or normalisation differ.
    """
    extractor, metadata = processor.feature_extractor, corpus.metadata
    model_set, corpus_set = LandmarkSet.from_dict(extractor.landmark_set), corpus.landmark_set
    differences = []
    if _what_counts(model_set) != _what_counts(corpus_set):
        differences.append(f"landmarks {_in_words(model_set)} and {_in_words(corpus_set)}")
    for name in ("fps", "normalisation"):
        ours, theirs = getattr(extractor, name), getattr(metadata, name)
        if ours != theirs:
            differences.append(f"{name} {ours} and {theirs}")
    if differences:
        raise UserError(
            f"the model and the corpus {corpus.path} do not fit each other: {'; '.join(differences)}: "
            "prepare the corpus again with the model's settings"
        )


def _what_counts(landmarks: LandmarkSet) -> tuple[Any, ...]:
    """What the numbers of a feature mean: two sets that share it are one to a model, whatever they are called."""
    relative = {part: landmarks.parts[part] for part in landmarks.anchors or {}}
    return landmarks.points, landmarks.channels, landmarks.anchors or {}, relative


def _in_words(landmarks: LandmarkSet) -> str:
    relative = f", {' and '.join(landmarks.anchors)} relative to an anchor" if landmarks.anchors else ""
    return f"{landmarks.name} ({landmarks.num_points} points, {' '.join(landmarks.channels)}{relative})"


def choose_splits(corpus: Corpus, names: str | None) -> list[str]:
    """The splits that were asked for, comma-separated, else every test split.

    Raises:
        UserError: the corpus lacks one, or it is empty.
    """
    chosen = names.split(",") if names else splits_to_test(corpus)
    missing = [name for name in chosen if not len(corpus.splits.get(name, ()))]
    if missing or not chosen:
        has = ", ".join(f"{name} ({len(split)} clips)" for name, split in corpus.splits.items()) or "none"
        raise UserError(f"the corpus {corpus.path} has no clips in split {', '.join(missing)}; its splits: {has}")
    return chosen


def default_out_folder(model: str | Path, corpus: Corpus) -> Path:
    """Where results go unless told: into the run, else beside where one stands."""
    run = run_of(model)
    return (run / "evaluation" if run else Path("evaluation") / Path(model).name) / corpus.path.name


def write_results(
    out: Path,
    model: str | Path,
    corpus: Corpus,
    results: dict[str, SplitResult],
    clips_per_second: float,
    neural: NeuralMetrics,
) -> dict[str, Any]:
    """Write ``scores.json``, one predictions file a split, and an n-best file where more than one text was asked for.

    Args:
        out: a folder, made where it is not there yet.
        model, corpus: what was evaluated on what.
        results: by split.
        clips_per_second: how fast.
        neural: learnt metrics to add.

    Returns:
        what ``scores.json`` says; its ``scores`` are those of the first split.
    """
    for name, result in results.items():
        write_predictions(out / f"{name}.csv", result.predictions)
        if result.n_best and len(result.n_best[0]) > 1:
            _write_n_best(out / f"{name}_n_best.csv", result)
    main = next(iter(results))
    splits = {name: _summary(result, neural) for name, result in results.items()}
    summary = {
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
    write_text_atomically(out / SCORES, json.dumps(summary, indent=2) + "\n")
    return summary


def _summary(result: SplitResult, neural: NeuralMetrics) -> dict[str, Any]:
    texts = [row.hypothesis for row in result.predictions], [row.reference for row in result.predictions]
    return {
        "clips": result.scores.clips,
        "scores": result.scores.values(),
        "intervals": {name: list(interval) for name, interval in result.intervals.items()},
        "floors": {kind: scores.values() for kind, scores in result.floors.items()},
        "neural": {name: neural_score(neural, name, *texts) for name in neural.checkpoints},
        "against_control": {name: asdict(item) for name, item in result.against_control.items()},
    }


def _write_n_best(path: Path, result: SplitResult) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(["uid", "place", "hypothesis", "score"])
        for row, found in zip(result.predictions, result.n_best, strict=True):
            for place, item in enumerate(found, start=1):
                writer.writerow([row.uid, place, item.text.replace("\0", " "), item.score])


def format_results(results: dict[str, SplitResult]) -> str:
    """The table of scores with floors and intervals, and what the control says."""
    rows: dict[str, Scores] = {}
    verdicts = []
    for name, result in results.items():
        rows[name] = result.scores
        rows |= {f"{name}, {FLOOR_LABELS[kind]}": scores for kind, scores in result.floors.items()}
        verdicts.append(f"{name}: {control_verdict(result)}")
    intervals = {name: result.intervals for name, result in results.items()}
    return "\n".join([scores_table(rows, intervals), "", *verdicts])


def control_verdict(result: SplitResult) -> str:
    """Whether the model looks at the signing at all, in words."""
    telling = next((name for name in CONTROL_SCORES if name in result.against_control), None)
    if telling is None:
        return "no score is applicable that would tell whether the model looks at the signing"
    item = result.against_control[telling]
    gain = (
        f"{HEADINGS[telling]} {item.second:.2f}, on the poses of other clips {item.first:.2f} (p = {item.p_value:.3f})"
    )
    if item.difference > 0 and item.p_value < SIGNIFICANT:
        return f"{gain}: the model looks at the signing"
    return f"{gain}: nothing shows that the model looks at the signing"


def compare_files(
    first: str | Path, second: str | Path, *, tokenize: str = "13a", lowercase: bool = False
) -> dict[str, Comparison]:
    """Paired bootstrap test between two prediction files of the same clips.

    Raises:
        UserError: a file is not one, or they are not about the same clips.
    """
    rows, others = _by_uid(first), _by_uid(second)
    lacking = [(uid, second) for uid in rows.keys() - others.keys()] + [
        (uid, first) for uid in others.keys() - rows.keys()
    ]
    if lacking or not rows:
        what = (
            f"{lacking[0][1]} has no clip {lacking[0][0]!r} ({len(lacking)} such)" if lacking else f"{first} is empty"
        )
        raise UserError(f"only predictions for the same clips can be compared: {what}")
    changed = [uid for uid, row in rows.items() if row.reference != others[uid].reference]
    if changed:
        raise UserError(
            f"{first} and {second} disagree about what clip {changed[0]!r} says ({len(changed)} such): "
            "compare files made from the same corpus"
        )
    references = [row.reference for row in rows.values()]
    how: dict[str, Any] = {
        "tokenize": tokenize,
        "lowercase": lowercase,
        "frequent_words": frequent_words(references, tokenize),
    }
    return compare(
        measure([row.hypothesis for row in rows.values()], references, **how),
        measure([others[uid].hypothesis for uid in rows], references, **how),
    )


def format_comparison(first: str | Path, second: str | Path, comparisons: dict[str, Comparison]) -> str:
    """The comparison as a table whose columns are called A and B."""
    return f"A  {first}\nB  {second}\n\n{comparison_table('A', 'B', comparisons)}"


def _by_uid(path: str | Path) -> dict[str, Prediction]:
    predictions = read_predictions(path)
    rows = {row.uid: row for row in predictions}
    if len(rows) < len(predictions):
        seen: set[str] = set()
        twice = next(row.uid for row in predictions if row.uid in seen or seen.add(row.uid))  # type: ignore[func-returns-value]
        raise UserError(f"{path} has the clip {twice!r} more than once: every clip may count only once")
    return rows
