"""Dropout that is quick on the CPU.

torch draws a Bernoulli number for every element there, one after the other. One draw of 64 bits decides four elements
here; `benchmarks/training.py` says what that gives. GPUs draw in parallel and keep torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 2**16  # of what one quarter of a draw can be


class QuickDropout(nn.Dropout):
    """What :class:`torch.nn.Dropout` computes, from torch's own generator, with ``p`` rounded to 1/65,536."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape.

        Args:
            input: a floating-point tensor; on any other device than the CPU torch's own dropout takes it.
        """
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        draws = torch.empty((input.numel() + 3) // 4, dtype=torch.int64)
        draws.random_(torch.iinfo(torch.int64).min, None)  # with no upper end: all 64 bits are random
        kept = draws.view(torch.int16)[: input.numel()] >= round(self.p * _LEVELS) - _LEVELS // 2
        return input * kept.view(input.shape).to(input.dtype).div_(1 - self.p)


def use_quick_dropout(model: nn.Module) -> None:
    """Turn a model's dropout layers into quick ones; what a backbone drops by a function call stays torch's."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = QuickDropout
