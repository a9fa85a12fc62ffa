"""A micro-batch whose forward pass runs out of memory is computed in two halves, where that changes nothing else.

Only with ``training.micro_batch_size=auto``, and only where no part of its gradient was sent or kept and no other rank
notices: in a forward pass, which leaves no gradient, at ZeRO stages 0 and 1, which sum over ranks once a step, or on a
single rank. With ``training.compile=graphs`` a backward pass leaves none either, until it has ended
(``pass_graphs.py``). The loss does not depend on the split. Elsewhere the run ends (``out_of_memory.py``) and resumes.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.batching.collate import Batch
from toolkit.cluster.memory_shortage import in_short, is_out_of_memory
from toolkit.errors import UserError
from toolkit.recipe.choices import mark_too_large
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.monitoring.memory_phases import Shape

log = logging.getLogger("toolkit")


@dataclass
class Halving:
    """The micro-batches of a rank, some of them in halves.

    Attributes:
        resolved: the run.
        rank: this one.
        warn: prints and logs on rank 0.
        too_large: padded frames of the smallest micro-batch that ran out of memory; None = none has.
        halved_in: the last step in which one did.
    """

    resolved: ResolvedRun
    rank: int
    warn: Callable[[str], None]
    too_large: int | None = None
    halved_in: int | None = None

    def compute(
        self,
        batch: Batch,
        step: int,
        forward: Callable[[Batch], tuple[Tensor, ...]],
        backward: Callable[..., list[Tensor]],
        *,
        is_last: bool,
    ) -> list[Tensor]:
        """Both passes of a micro-batch.

        Args:
            batch: of this step.
            step: that it belongs to, from 1.
            forward: gives the losses of a batch.
            backward: takes each of them, and whether they are the last ones of the step; what it returns is kept.
            is_last: whether the micro-batch is the last one of the step.

        Returns:
            what ``backward`` has returned.
        """
        if self.too_large is not None and batch.frame_mask.numel() >= self.too_large and len(batch) > 1:
            return self._in_halves(batch, forward, backward, is_last=is_last)
        try:
            losses = forward(batch)
        except Exception as error:
            if not self._may_halve(batch, step, error):
                raise
            said = in_short(error)
        else:
            return backward(*losses, is_last)
        # The error and its traceback are gone, and with them the tensors of the pass.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.too_large, self.halved_in = batch.frame_mask.numel(), step
        self._report(batch, step, said)
        return self._in_halves(batch, forward, backward, is_last=is_last)

    def both(self, step: int, passes: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
        """The losses of a micro-batch whose two passes are one call, which keeps nothing where it fails."""
        return self.compute(batch, step, lambda part: (passes(part),), lambda losses, _: [losses], is_last=True)

    def _in_halves(self, batch: Batch, forward: Any, backward: Any, *, is_last: bool) -> list[Tensor]:
        first, second = batch.halves()
        found: list[Tensor] = backward(*forward(first), False)
        return [*found, *backward(*forward(second), is_last)]

    def _may_halve(self, batch: Batch, step: int, error: Exception) -> bool:
        alone = self.resolved.world_size == 1 or self.resolved.zero_stage <= 1
        once = self.halved_in != step
        return bool(self.resolved.choice) and alone and once and len(batch) > 1 and is_out_of_memory(error)

    def _report(self, batch: Batch, step: int, said: str) -> None:
        """Say so, on any rank, and let the next start take smaller micro-batches."""
        what = f"rank {self.rank} ran out of memory in step {step}, in a micro-batch of {Shape.of(batch)} ({said})"
        text = f"{what}; it was computed again in two halves, and so are others as large from now on"
        if self.rank == 0:
            self.warn(text)
        else:
            log.warning(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)
        choice = self.resolved.choice
        if choice and not choice.is_smallest:
            try:
                mark_too_large(self.resolved.run_dir, choice, what)
            except (OSError, UserError) as error:
                log.warning("the next start may try such micro-batches again: %s", error)
