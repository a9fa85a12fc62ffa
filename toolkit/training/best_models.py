"""The models that a run keeps by their dev score.

    best/            always the best one
    best_000400/     with training.keep_best > 1 the runners-up, by the step at which they were evaluated

``evaluation.json`` in each says of which step it is and how it scored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.errors import UserError
from toolkit.evaluation.metrics import Scores, better
from toolkit.recipe.files import write_text_atomically

BEST = "best"
EVALUATION = "evaluation.json"
# Of each model that is kept the step, and the score that it was chosen by; best first.
Kept = list[tuple[int, float | None]]


def admit(kept: Kept, step: int, scores: Scores, *, select_by: str, keep: int) -> Kept:
    """The models to keep once another has been scored.

    Args:
        kept: those kept so far.
        step: of the new one.
        scores: of the new one.
        select_by: the score that decides; one that is n/a is worse than any other, and of equals the older wins.
        keep: how many to keep.
    """
    sign = 1 if better(select_by) else -1

    def merit(model: tuple[int, float | None]) -> tuple[bool, float]:
        return model[1] is not None, sign * (model[1] or 0.0)

    # A run that was taken up again evaluates a step once more.
    others = [(earlier, value) for earlier, value in kept if earlier != step]
    return sorted([*others, (step, scores.values()[select_by])], key=merit, reverse=True)[:keep]


def folder_of(run_dir: Path, step: int) -> Path:
    """Where a runner-up of that step is."""
    return run_dir / f"{BEST}_{step:06d}"


def place_model(run_dir: Path, kept: Kept, step: int, scores: Scores | None, save: Callable[[Path], None]) -> None:
    """Write the model of ``step`` and remove those that are no longer kept; one rank calls this.

    Args:
        run_dir: of the run.
        kept: from :func:`admit`; the model is among them.
        step: optimizer steps that it has learnt.
        scores: on the dev split, where there is one.
        save: writes the model to a folder.

    Raises:
        UserError: it cannot be written; those that were there before still are.
    """
    folder, best = folder_of(run_dir, step), run_dir / BEST
    try:
        save(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model of step {step} cannot be written to {folder}: {error}") from error
    content: dict[str, Any] = {"step": step, "scores": scores.values() if scores else None}
    write_text_atomically(folder / EVALUATION, json.dumps(content, indent=2) + "\n")
    if kept[0][0] == step:
        if best.exists():
            # Its own file says which it is: the run may have died after it was written, and not remember.
            runner_up = folder_of(run_dir, json.loads((best / EVALUATION).read_text(encoding="utf-8"))["step"])
            if runner_up.exists():
                shutil.rmtree(best)
            else:
                best.rename(runner_up)
        folder.rename(best)
    remaining = {folder_of(run_dir, earlier) for earlier, _ in kept[1:]}
    for other in run_dir.glob(f"{BEST}_*"):
        if other.name.removeprefix(f"{BEST}_").isdigit() and other not in remaining:
            shutil.rmtree(other)
