"""What a run should be warned of while it goes on: a loss that jumps, and a model that says the same to every clip.

Neither stops it. Each warning names what usually causes it, in the order in which it pays to look.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

# A spike is told from noise by the robust deviation of the steps before it, and must be a large one, too.
WINDOW = 50
FEWEST_STEPS = 20
DEVIATIONS = 8.0
LEAST_RISE = 1.3
# As many standard deviations of a normal distribution as one median absolute deviation.
MAD_TO_DEVIATION = 1.4826

# Different hypotheses for each different reference, below which the outputs count as all alike.
ALIKE_SHARE = 0.05


class SpikeWatch:
    """Remembers the losses of late and says when one stands out of them.

    After a warning it is silent until it has seen as many steps as it needs to judge again.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def see(self, step: int, loss: float, grad_norm: float | None) -> str | None:
        """Take in a step.

        Args:
            step: optimizer steps done.
            loss: of the last one.
            grad_norm: of the last one, before clipping; None where it is not known.

        Returns:
            a warning, or None.
        """
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
            f"the loss jumped to {loss:.3f} at step {step} (median of late {middle:.3f}{norm}): if it does not come "
            "back by itself, lower training.learning_rate, raise training.warmup_ratio, set training.gradient_clipping "
            "to 1 or less, or look at the longest clips and texts"
        )


def collapse_warning(
    epoch: int,
    hypotheses: Sequence[str],
    references: Sequence[str],
    name: str,
    value: float | None,
    floor: float | None,
) -> str | None:
    """A warning where a model says the same to every clip, or scores like one sentence said to all of them.

    Args:
        epoch: epochs done.
        hypotheses, references: of the dev split.
        name: the score that picks the best model.
        value, floor: that score, of the model and of the constant sentence.

    Returns:
        the warning, or None.
    """
    distinct, wanted = len(set(hypotheses)), len(set(references))
    if wanted < 2:
        return None
    share = len(set(hypotheses)) / len(hypotheses)
    if distinct <= max(1.0, ALIKE_SHARE * wanted):
        what = f"the model says {distinct} different sentences to {len(hypotheses)} clips ({100 * share:.1f} %)"
    elif value is not None and value == floor:
        what = f"{name} {value:.4g} is exactly that of one sentence said to every clip"
    else:
        return None
    return (
        f"outputs after epoch {epoch} are all alike: {what}. Usual in the first epochs; later it means that the "
        "decoder has learnt the texts and not the poses: try --overfit 8 on this data, a higher "
        "training.pose_encoder_learning_rate or training.ctc_weight=0.3, and see that poses and texts belong together"
    )
