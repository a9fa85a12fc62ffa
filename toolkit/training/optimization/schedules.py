"""Learning-rate schedules as plain functions of the optimizer step (never of micro-batches)."""

from __future__ import annotations

import math

from toolkit.checkpointing.checkpoints import Extension
from toolkit.recipe.schema import Training


def warmup_steps(training: Training, total: int, extension: Extension | None) -> int:
    """Optimizer steps until the peak."""
    return extension.warmup_steps if extension else int(training.warmup_ratio * total)


def scheduled_factor(training: Training, step: int, total: int, extension: Extension | None) -> float:
    """The factor on the peak learning rate in a run that may have been extended.

    An extended run continues by the schedule of the longer run. Where that is higher than the rate that the run had,
    the rate rises to it over a second warm-up: ``training.warmup_ratio`` of the steps from there to the new end.

    ``step`` optimizer steps are done before this one; ``total`` includes those of the extension.
    """
    factor = learning_rate_factor(training.schedule, step, total, warmup_steps(training, total, extension))
    if extension is None:
        return factor
    rise = int(training.warmup_ratio * (total - extension.step))
    share = min(1.0, (step - extension.step + 1) / (rise + 1))
    return factor * (extension.ratio + (1.0 - extension.ratio) * share)


def extended(training: Training, step: int, before: int, after: int, extension: Extension | None) -> Extension:
    """The extension of a run from ``before`` to ``after`` optimizer steps, of which ``step`` are done."""
    warmup = warmup_steps(training, before, extension)
    reached = scheduled_factor(training, step, before, extension)
    return Extension(step, min(1.0, reached / learning_rate_factor(training.schedule, step, after, warmup)), warmup)


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor on the peak learning rate after ``step`` optimizer steps.

    The schedule is ``linear``, ``cosine``, ``constant`` or ``inverse_sqrt``, each after a linear warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return math.sqrt((warmup_steps + 1) / (step + 1))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def backbone_factor(factor: float, step: int, frozen_steps: int, warmup_steps: int) -> float:
    """The same for a backbone that is frozen for the first steps: 0, then a second warm-up.

    ``factor`` is that of the rest of the model, at which the warm-up ends.
    """
    if step < frozen_steps:
        return 0.0
    if not frozen_steps:
        return factor
    return min(factor, (step - frozen_steps + 1) / (warmup_steps + 1))
