"""The models that a run keeps by their dev score.

    best/            always the best one
    best_000400/     with training.keep_best > 1 the runners-up, by the step at which they were evaluated

``evaluation.json`` in each says of which step it is and how it scored. A run can be killed between any two operations
here, and between an evaluation and the checkpoint that remembers it. So a model loses its name before it loses a file;
one that the newest checkpoint remembers stays until a newer checkpoint has forgotten it; and a run that goes on brings
the folders in line with its checkpoint (:func:`restore_models`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.errors import UserError
from toolkit.files import write_text_atomically
from toolkit.recipe.paths import BEST
from toolkit.scoring.metrics import Scores, better

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

    return sorted([*kept, (step, scores.values()[select_by])], key=merit, reverse=True)[:keep]


def folder_of(run_dir: Path, step: int) -> Path:
    """Where a model of that step is while it is not the best."""
    return run_dir / f"{BEST}_{step:06d}"


def place_model(
    run_dir: Path,
    kept: Kept,
    step: int,
    scores: Scores | None,
    save: Callable[[Path], None],
    *,
    remembered: Iterable[int] = (),
) -> None:
    """Write the model of ``step`` and remove those that are no longer kept; one rank calls this.

    Args:
        run_dir: of the run.
        kept: from :func:`admit`; the model is among them.
        step: optimizer steps that it has learnt.
        scores: on the dev split, where there is one.
        save: writes the model to a folder.
        remembered: steps of the models that a checkpoint remembers, which stay until it is not the newest any more.

    Raises:
        UserError: it cannot be written; those that were there before still are.
    """
    folder = folder_of(run_dir, step)
    try:
        save(folder)
    except (OSError, SafetensorError) as error:
        _remove(folder)
        raise UserError(f"the model of step {step} cannot be written to {folder}: {error}") from error
    content: dict[str, Any] = {"step": step, "scores": scores.values() if scores else None}
    write_text_atomically(folder / EVALUATION, json.dumps(content, indent=2) + "\n")
    _name_the_best(run_dir, kept[0][0])
    keep_only(run_dir, [*(earlier for earlier, _ in kept), *remembered])


def keep_only(run_dir: Path, steps: Iterable[int]) -> None:
    """Remove the models of all other steps."""
    wanted = set(steps)
    for step, folder in models_in(run_dir).items():
        if step not in wanted:
            _remove(folder)


def models_in(run_dir: Path) -> dict[int, Path]:
    """The folders of all models of a run, by the step that they have learnt."""
    named = (path for path in run_dir.glob(f"{BEST}_*") if path.name.removeprefix(f"{BEST}_").isdigit())
    found = {int(path.name.removeprefix(f"{BEST}_")): path for path in named}
    best = run_dir / BEST
    return found | {step_of(best): best} if best.exists() else found


def step_of(folder: Path) -> int:
    """Optimizer steps that the model in ``folder`` has learnt.

    Raises:
        UserError: it does not say.
    """
    path = folder / EVALUATION
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not readable: move {folder} away, or start anew with --new") from error


def restore_models(run_dir: Path, kept: Kept, step: int, newest: int) -> Kept:
    """Bring the models of a run that goes on in line with its checkpoint; one rank calls this.

    Args:
        run_dir: of the run.
        kept: what the checkpoint remembers.
        step: optimizer steps done by then.
        newest: the same of the newest checkpoint of the run. A run that goes on from an older one leaves the models
            that it has in between, set aside as ``best_000500.aside_1``; what came after the newest comes again.

    Returns:
        those of ``kept`` that are still there. A run that goes on in another folder, or from a checkpoint that is not
        its newest, may have lost some.
    """
    for unfinished in run_dir.glob(f".{BEST}*"):
        shutil.rmtree(unfinished)
    found = models_in(run_dir)
    kept = [(earlier, value) for earlier, value in kept if earlier in found]
    for other in found.keys() - dict(kept).keys():
        if step < other <= newest:
            _set_aside(run_dir, found[other], other)
        else:
            _remove(found[other])
    if kept:
        _name_the_best(run_dir, kept[0][0])
    return kept


def _name_the_best(run_dir: Path, step: int) -> None:
    """Let the model of ``step`` be ``best/``, and the one that was so far get its own name."""
    best = run_dir / BEST
    if best.exists():
        if step_of(best) == step:
            return
        best.rename(folder_of(run_dir, step_of(best)))
    folder_of(run_dir, step).rename(best)


def _set_aside(run_dir: Path, folder: Path, step: int) -> None:
    number = 1
    while (target := run_dir / f"{folder_of(run_dir, step).name}.aside_{number}").exists():
        number += 1
    folder.rename(target)


def _remove(folder: Path) -> None:
    """Remove a model, which has lost its name before it has lost a file."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        folder.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)
