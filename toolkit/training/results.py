"""``scores.json`` of a finished run: written, read, and formatted for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.checkpointing.checkpoints import Progress
from toolkit.errors import UserError
from toolkit.evaluation.splits import SplitResult
from toolkit.files import write_text_atomically
from toolkit.recipe.resolve import ResolvedRun
from toolkit.scoring.floors import FLOOR_LABELS
from toolkit.scoring.metrics import Scores
from toolkit.scoring.predictions import read_predictions, write_predictions
from toolkit.scoring.table import choose_samples, samples_text, scores_table

SCORES = "scores.json"


def write_scores(
    resolved: ResolvedRun, progress: Progress, results: dict[str, SplitResult], peak_memory_gib: float
) -> dict[str, Any]:
    """Write ``scores.json`` and one predictions file for each split.

    Returns:
        the content of ``scores.json``; its ``scores`` are those of the first split.
    """
    predictions = resolved.run_dir / "predictions"
    for name, result in results.items():
        write_predictions(predictions / f"{name}.csv", result.predictions)
    main = next(iter(results))
    splits = {
        name: {
            "clips": result.scores.clips,
            "scores": result.scores.values(),
            "intervals": {score: list(interval) for score, interval in result.intervals.items()},
            "floors": {kind: scores.values() for kind, scores in result.floors.items()},
        }
        for name, result in results.items()
    }
    summary = {
        "run_dir": str(resolved.run_dir),
        "steps": progress.step,
        "clips_per_second": round(progress.clips / progress.seconds, 2) if progress.seconds else None,
        "split": main,
        "scores": splits[main]["scores"],
        "floors": splits[main]["floors"],
        "signature": results[main].scores.signature,
        "splits": splits,
        "best_step": progress.best_step,
        "training_seconds": round(progress.seconds, 1),
        "world_size": resolved.world_size,
        "zero_stage": resolved.zero_stage,
        "peak_memory_gib": round(peak_memory_gib, 3),
    }
    write_text_atomically(resolved.run_dir / SCORES, json.dumps(summary, indent=2) + "\n")
    return summary


def read_scores(run_dir: Path) -> dict[str, Any]:
    """The ``scores.json`` of a finished run.

    Raises:
        UserError: there is none, or it is not readable.
    """
    path = run_dir / SCORES
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable ({error})", "train again with --new") from error


def format_summary(summary: dict[str, Any], samples: int, seed: int) -> str:
    """Scores beside their floors, sample outputs, and the path of the run directory."""
    rows = {}
    for name, split in summary["splits"].items():
        described = {"clips": split["clips"], "signature": summary["signature"]}
        rows[name] = Scores(**split["scores"], **described)
        for kind, values in split["floors"].items():
            rows[f"{name}, {FLOOR_LABELS[kind]}"] = Scores(**values, **described)
    run_dir = Path(summary["run_dir"])
    predictions = read_predictions(run_dir / "predictions" / f"{summary['split']}.csv")
    shown = samples_text(choose_samples(predictions, samples, seed))
    return f"{scores_table(rows)}\n\nsamples from {summary['split']}\n\n{shown}\n\nrun directory: {run_dir}"
