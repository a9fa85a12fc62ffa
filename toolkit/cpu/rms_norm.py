"""T5's normalisation in fewer passes over its tensors than autograd, which records each of its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# transformers' classes, which all compute the same.
_NAMES = ("LongT5LayerNorm", "MT5LayerNorm", "T5LayerNorm", "UMT5LayerNorm")


class CPURMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019) without bias; mixed into a class of transformers'."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Scale states [..., width] to a mean square of one, then by the weight.

        In evaluation, and on GPUs, transformers' own forward is called.
        """
        if not self.training or hidden_states.device.type != "cpu":
            own: Tensor = super().forward(hidden_states)
            return own
        normalised: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return normalised


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = states.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norms.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        context.save_for_backward(states, weight, scale)
        return weight * (wide * scale).to(weight.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        states, weight, scale = context.saved_tensors
        unit, slopes, wide_weight = states.float() * scale, gradient.float(), weight.float()
        products = slopes * unit
        for_weight = products.flatten(0, -2).sum(0).to(weight.dtype) if context.needs_input_grad[1] else None
        along = (products @ wide_weight).div_(states.shape[-1]).unsqueeze(-1)
        for_states = torch.addcmul(slopes * wide_weight, unit, along, value=-1).mul_(scale)
        return for_states.to(states.dtype), for_weight, None


def use_cpu_rms_norm(model: nn.Module) -> None:
    """Make the normalisation layers of T5 and its kin :class:`CPURMSNorm`."""
    for module in model.modules():
        own = type(module)
        if own.__name__ in _NAMES:
            module.__class__ = type(f"CPU{own.__name__}", (CPURMSNorm, own), {})
