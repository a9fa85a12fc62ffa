"""``scores.json`` of a finished run: written, read, and formatted for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    resolved: ResolvedRun,
    progress: Progress,
    results: dict[str, SplitResult],
    peak_memory_gib: float,
    echo: Callable[[str], None],
) -> dict[str, Any]:
    """Write ``scores.json`` and one predictions file a split; scores that cannot be written are printed at least.

    Returns:
        the content of ``scores.json``; its ``scores`` are those of the first split.

    Raises:
        OSError, UserError: the run directory cannot be written.
    """
    main = next(iter(results))
    splits = {name: result.summary() for name, result in results.items()}
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
    try:
        for name, result in results.items():
            write_predictions(resolved.run_dir / "predictions" / f"{name}.csv", result.predictions)
        write_text_atomically(resolved.run_dir / SCORES, json.dumps(summary, indent=2) + "\n")
    except (OSError, UserError):
        echo(f"\n{format_scores(summary)}\n")
        raise
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


def format_scores(summary: dict[str, Any]) -> str:
    """The scores of every split beside their floors, as a table."""
    rows = {}
    for name, split in summary["splits"].items():
        described = {"clips": split["clips"], "signature": summary["signature"]}
        rows[name] = Scores(**split["scores"], **described)
        for kind, values in split["floors"].items():
            rows[f"{name}, {FLOOR_LABELS[kind]}"] = Scores(**values, **described)
    return scores_table(rows)


def format_summary(summary: dict[str, Any], samples: int, seed: int) -> str:
    """Scores beside their floors, sample outputs, and the path of the run directory."""
    run_dir = Path(summary["run_dir"])
    predictions = read_predictions(run_dir / "predictions" / f"{summary['split']}.csv")
    shown = samples_text(choose_samples(predictions, samples, seed))
    return f"{format_scores(summary)}\n\nsamples from {summary['split']}\n\n{shown}\n\nrun directory: {run_dir}"
