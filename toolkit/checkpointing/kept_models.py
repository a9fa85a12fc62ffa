"""The models that a run keeps by their dev score.

    best/            the best one
    best_000400/     with training.keep_best > 1 the runners-up, by the step at which they were evaluated

``evaluation.json`` in each holds its step and its scores. A run can be killed between any two operations here, and
between an evaluation and the next checkpoint. Therefore a model is renamed before it is removed; a model that the
newest checkpoint lists stays until a newer checkpoint does not list it; and a run that resumes makes the folders agree
with its checkpoint (:func:`restore_models`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.errors import UserError
from toolkit.files import next_free, write_text_atomically
from toolkit.recipe.paths import BEST
from toolkit.scoring.metrics import Scores, higher_is_better

EVALUATION = "evaluation.json"
# Step and score (training.select_by) of each model that is kept, the best one first.
Kept = list[tuple[int, float | None]]


def admit(kept: Kept, step: int, scores: Scores, *, select_by: str, keep: int) -> Kept:
    """The best ``keep`` models once another has been scored.

    A score that is n/a is worse than any other, and of two equal ones the older is better.
    """
    sign = 1 if higher_is_better(select_by) else -1

    def merit(model: tuple[int, float | None]) -> tuple[bool, float]:
        return model[1] is not None, sign * (model[1] or 0.0)

    return sorted([*kept, (step, scores.values()[select_by])], key=merit, reverse=True)[:keep]


def folder_of(run_dir: Path, step: int) -> Path:
    """Folder of a model of that step that is not the best one."""
    return run_dir / f"{BEST}_{step:06d}"


def place_model(
    run_dir: Path,
    kept: Kept,
    step: int,
    scores: Scores | None,
    save: Callable[[Path], None],
    *,
    in_checkpoints: Iterable[int] = (),
) -> None:
    """Write the model of ``step`` and remove those that are no longer kept; one rank calls this.

    Models that the newest checkpoints list, by the steps ``in_checkpoints``, stay, too.

    Raises:
        UserError: it cannot be written; the models that were kept so far are unchanged.
    """
    folder = folder_of(run_dir, step)
    try:
        save(folder)
    except (OSError, SafetensorError) as error:
        _remove(folder)
        raise UserError(
            f"the model of step {step} cannot be written to {folder} ({error})",
            f"free disk space in {run_dir}; the same command then resumes from the newest checkpoint",
        ) from error
    content: dict[str, Any] = {"step": step, "scores": scores.values() if scores else None}
    write_text_atomically(folder / EVALUATION, json.dumps(content, indent=2) + "\n")
    _name_best(run_dir, kept[0][0])
    keep_only(run_dir, [*(earlier for earlier, _ in kept), *in_checkpoints])


def keep_only(run_dir: Path, steps: Iterable[int]) -> None:
    """Remove the models of all other steps."""
    wanted = set(steps)
    for step, folder in models_in(run_dir).items():
        if step not in wanted:
            _remove(folder)


def models_in(run_dir: Path) -> dict[int, Path]:
    """The folders of all models of a run, by step."""
    named = (path for path in run_dir.glob(f"{BEST}_*") if path.name.removeprefix(f"{BEST}_").isdigit())
    found = {int(path.name.removeprefix(f"{BEST}_")): path for path in named}
    best = run_dir / BEST
    return found | {step_of(best): best} if best.exists() else found


def step_of(folder: Path) -> int:
    """Optimizer step of the model in ``folder``.

    Raises:
        UserError: ``evaluation.json`` does not say it.
    """
    path = folder / EVALUATION
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not readable", f"move {folder} away, or start again with --new") from error


def restore_models(run_dir: Path, kept: Kept, step: int, newest: int) -> Kept:
    """Make the model folders of a run that resumes at ``step`` agree with its checkpoint; one rank calls this.

    Models between the checkpoint and ``newest``, the step of the run's newest one, are archived as
    ``best_000500.aside_1``; models after the newest checkpoint are removed, because those steps run again.

    Returns:
        those of ``kept`` that still exist. A run that resumes in another folder, or from a checkpoint that is not its
        newest, may have lost some.
    """
    for unfinished in run_dir.glob(f".{BEST}*"):
        shutil.rmtree(unfinished)
    found = models_in(run_dir)
    kept = [(earlier, value) for earlier, value in kept if earlier in found]
    for other in found.keys() - dict(kept).keys():
        if step < other <= newest:
            found[other].rename(next_free(folder_of(run_dir, other), ".aside_"))
        else:
            _remove(found[other])
    if kept:
        _name_best(run_dir, kept[0][0])
    return kept


def _name_best(run_dir: Path, step: int) -> None:
    """Rename the model of ``step`` to ``best/``, and the one that was there to the name of its own step."""
    best = run_dir / BEST
    if best.exists():
        if step_of(best) == step:
            return
        best.rename(folder_of(run_dir, step_of(best)))
    folder_of(run_dir, step).rename(best)


def _remove(folder: Path) -> None:
    """Remove a model; it is renamed first, so that no incomplete one ever has its name."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        folder.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)
