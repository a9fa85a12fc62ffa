"""Warn of a loss that jumps; the run continues."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# A spike must exceed the median of the steps before it by many robust deviations, and by this factor.
WINDOW = 50
FEWEST_STEPS = 20
DEVIATIONS = 8.0
LEAST_RISE = 1.3
# As many standard deviations of a normal distribution as one median absolute deviation.
MAD_TO_DEVIATION = 1.4826


class LossSpikes:
    """Compares each loss with the last ones.

    After a warning it starts over: the next can come when it has seen enough steps again.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def see(self, step: int, loss: float, grad_norm: float | None) -> str | None:
        """Add a step's loss, in nats per token, and gradient norm, if known; returns a warning where it jumped."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < FEWEST_STEPS:
            return None
        middle = median(before)
        spread = MAD_TO_DEVIATION * median(abs(value - middle) for value in before)
        if loss <= max(LEAST_RISE * middle, middle + DEVIATIONS * spread):
            return None
        self._losses.clear()
        norm = f", gradient norm {grad_norm:.3g}" if grad_norm is not None and math.isfinite(grad_norm) else ""
        return (
            f"the loss jumped to {loss:.3f} at step {step} (median of {len(before)} steps before: {middle:.3f}{norm}); "
            "if it does not recover, lower training.learning_rate, raise training.warmup_ratio, set "
            "training.gradient_clipping to 1 or less, or look at the longest clips and texts"
        )
