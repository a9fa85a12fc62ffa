"""Linear layers that train fast in bf16 on processors without instructions for it.

Without AVX-512 torch multiplies bf16 matrices far slower than fp32, in the backward pass most of all. There the
products are computed in fp32 from the bf16 values, and rounded to bf16 once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Fp32Linear(nn.Linear):
    """:class:`torch.nn.Linear`, whose training in bf16 on a CPU multiplies in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to [..., in_features]; outside of training in bf16 on a CPU by torch's own forward."""
        is_bf16 = input.dtype == self.weight.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
        if not self.training or not is_bf16 or input.device.type != "cpu":
            return super().forward(input)
        output: Tensor = _Linear.apply(input, self.weight, self.bias)
        return output


class _Linear(torch.autograd.Function):
    """Saves the bf16 tensors, and converts them again for the backward pass."""

    @staticmethod
    def forward(context: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(input, weight)
        output = torch.matmul(input.float(), weight.float().t())
        return (output if bias is None else output.add_(bias)).to(input.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = context.saved_tensors
        slopes = gradient.float()
        for_input = for_weight = for_bias = None
        if context.needs_input_grad[0]:
            for_input = torch.matmul(slopes, weight.float()).to(input.dtype)
        if context.needs_input_grad[1]:
            for_weight = torch.mm(slopes.flatten(0, -2).t(), input.flatten(0, -2).float()).to(weight.dtype)
        if context.needs_input_grad[2]:
            for_bias = slopes.flatten(0, -2).sum(0).to(weight.dtype)
        return for_input, for_weight, for_bias


def use_fp32_linear(model: nn.Module) -> None:
    """Have a model's linear layers multiply in fp32 where the processor has no fast bf16."""
    if has_fast_bf16():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Fp32Linear


@torch.compiler.assume_constant_result
def has_fast_bf16() -> bool:
    """Whether torch multiplies bf16 by instructions of this processor."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()
