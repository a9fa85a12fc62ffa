"""Warn of steps that change no weight, because their gradient is not finite; the run continues."""

from __future__ import annotations

import math


class SkippedSteps:
    """Looks at the gradient norm of each step; of several skipped ones in a row only the first is a warning.

    With ``may_overflow`` none is: the loss scale of fp16 finds its value by such steps.
    """

    def __init__(self, *, may_overflow: bool) -> None:
        self._may_overflow = may_overflow
        self._was_finite = True

    def see(self, step: int, grad_norm: float | None) -> str | None:
        """Look at a step's gradient norm, if known; returns a warning where it is the first that is not finite."""
        is_finite = grad_norm is None or math.isfinite(grad_norm)
        is_first, self._was_finite = self._was_finite and not is_finite, is_finite
        if not is_first or self._may_overflow:
            return None
        return (
            f"the gradient of step {step} is not finite, and its loss is: the step changes no weight, as any that "
            "follows with such a gradient; if they are many, lower training.learning_rate or train in fp32"
        )
