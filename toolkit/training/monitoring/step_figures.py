"""Figures of a step that are on the device, read with as little waiting as possible.

A number that the host reads from a GPU makes it wait until the GPU has done all that it was given, and the GPU then
waits for the host's next kernel. So a step reads once, just before the optimizer: counts, losses, the request to stop
and what the guards need, which must be known before the weights change. The gradient norm that DeepSpeed computes while
the optimizer steps is read one step later, with the next step's figures; that step's row is logged then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.batching.collate import Batch
from toolkit.training.monitoring.gradient_guard import TrainingStopped


def read_together(*parts: Tensor) -> list[list[float]]:
    """The numbers of several small tensors on one device; the host waits once."""
    numbers: list[float] = torch.cat([part.detach().flatten().double() for part in parts]).tolist()
    sizes = [part.numel() for part in parts]
    return [numbers[sum(sizes[:place]) : sum(sizes[: place + 1])] for place in range(len(sizes))]


def check_losses(
    sums: Sequence[float], own: Sequence[float], batches: Sequence[Batch], step: int, run_dir: Path, rank: int
) -> None:
    """Stop where the losses over all ranks, ``sums``, are not finite; all ranks call this.

    Raises:
        TrainingStopped: they are not; every rank whose ``own`` losses are not has written its clips to a file.
    """
    if all(map(math.isfinite, sums)):
        return
    if not all(map(math.isfinite, own)):
        uids = [uid for batch in batches for uid in batch.uids]
        path = run_dir / f"not_finite_rank_{rank:02d}.txt"
        path.write_text("\n".join(uids) + "\n", encoding="utf-8")
    raise TrainingStopped(
        f"the loss is not finite at step {step}; the clips of that step are listed in {run_dir}/not_finite_rank_*.txt",
        "look at these clips, or lower training.learning_rate",
    )


class LateNorm:
    """Holds what a step will log until its gradient norm has been read.

    ``log`` is called with the norm (None where the engine knows none) once for each step, in order.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None
        self._log: Callable[[float | None], None] | None = None

    def unread(self, device: torch.device) -> Tensor:
        """The norm that is to be read with the next figures, if any: one number or none, on ``device``."""
        return torch.zeros(0, device=device) if self._norm is None else self._norm.to(device, non_blocking=True)

    def arrived(self, norm: list[float]) -> None:
        """Log the step before with its norm, as :func:`read_together` gave it; nothing is held afterwards."""
        log, self._log, self._norm = self._log, None, None
        if log:
            log(norm[0])

    def hold(self, norm: Any, log: Callable[[float | None], None]) -> None:
        """Log a step when its norm has been read: at once where that is a number of the host, or None."""
        if isinstance(norm, Tensor):
            self._norm, self._log = norm, log
        else:
            log(norm)

    def flush(self) -> None:
        """Log what is held, and wait for it: before an evaluation, a save and the end."""
        if self._norm is not None:
            self.arrived([float(self._norm)])
