"""Dropout that is fast on the CPU.

torch draws one Bernoulli number per element there, one after the other. Here one draw of 64 bits decides four elements,
by a generator of numpy that is seeded from torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 2**16  # of what one quarter of a draw can be
_ONE = 0x3F80  # the bits of 1 in bf16


class CPUDropout(nn.Dropout):
    """:class:`torch.nn.Dropout` with ``p`` rounded to 1/65,536; torch's seed decides it."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape; on other devices than the CPU torch's own dropout does it."""
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        dropped: Tensor = _Dropout.apply(input, self.p)
        return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, input: Tensor, p: float) -> Tensor:
        kept = draw_kept(input, p)
        context.save_for_backward(kept)
        context.p = p
        return drop(input, kept, p)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = context.saved_tensors
        return drop(gradient, kept, context.p), None


def draw_kept(like: Tensor, p: float) -> Tensor:
    """1 for each element of a tensor that is kept, 0 for one that is dropped (with probability ``p``).

    Dtype and shape are those of the tensor.
    """
    numel = like.numel()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    generator = np.random.Generator(np.random.SFC64(seed))
    draws = torch.from_numpy(generator.integers(-(2**63), 2**63, numel // 4 + 1, dtype=np.int64))
    quarters = draws.view(torch.int16)[:numel]
    least = round(p * _LEVELS) - _LEVELS // 2
    if like.dtype == torch.bfloat16:  # as wide as a quarter: the draws become ones and zeros where they are
        return torch.ge(quarters, least, out=quarters).mul_(_ONE).view(like.dtype).view(like.shape)
    kept = torch.empty(numel, dtype=like.dtype)
    torch.ge(quarters, least, out=kept)
    return kept.view(like.shape)


def drop(values: Tensor, kept: Tensor, p: float) -> Tensor:
    """Kept values, scaled so that the mean stays; the others become zero."""
    return torch.addcmul(values.new_zeros(()), values, kept, value=1 / (1 - p))


def use_cpu_dropout(model: nn.Module) -> None:
    """Make a model's dropout layers :class:`CPUDropout`; calls of ``torch.nn.functional.dropout`` stay torch's."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = CPUDropout
