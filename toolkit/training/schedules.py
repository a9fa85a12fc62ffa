"""Learning-rate schedules as plain functions of the optimizer step (never of micro-batches)."""

from __future__ import annotations

import math


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """What the peak learning rate is multiplied by.

    Args:
        schedule: ``linear``, ``cosine``, ``constant`` or ``inverse_sqrt``, each after a linear warm-up.
        step: optimizer steps done before this one, from 0.
        total_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the peak.

    Raises:
        ValueError: the schedule is unknown.
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
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}")


def backbone_factor(factor: float, step: int, frozen_steps: int, warmup_steps: int) -> float:
    """The same for a backbone that waits for its pose encoder: nothing at first, then a warm-up of its own.

    Args:
        factor: what the rest of the model has.
        step: optimizer steps done before this one, from 0.
        frozen_steps: optimizer steps that the backbone waits; 0 = none.
        warmup_steps: optimizer steps until it learns as the rest does.
    """
    if step < frozen_steps:
        return 0.0
    if not frozen_steps:
        return factor
    return min(factor, (step - frozen_steps + 1) / (warmup_steps + 1))
