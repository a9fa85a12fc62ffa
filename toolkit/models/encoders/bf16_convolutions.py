"""Convolutions that are fast in bf16 on processors without fast bf16 as well, and compiled once for all lengths.

There torch convolves bf16 by slow reference code, so these convolve in fp32 and round the result to bf16. Weights,
gradients and names are those of torch's layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.cpu import linear
from toolkit.models.encoders.opaque_convolutions import convolution


class Conv1d(nn.Conv1d):
    """torch's, over time."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(self, super()._conv_forward, input, weight, bias)


class Conv2d(nn.Conv2d):
    """torch's, over time and nodes."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(self, super()._conv_forward, input, weight, bias)


def _convolve(layer: Any, written: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = input.dtype
    if input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    convolve = partial(_convolve_compiled, layer) if torch.compiler.is_compiling() else written
    if input.device.type != "cpu" or dtype != torch.bfloat16 or linear.has_fast_bf16():
        result: Tensor = convolve(input, weight, bias)
        return result
    with torch.autocast("cpu", enabled=False):
        result = convolve(input.float(), weight.float(), None if bias is None else bias.float())
    return result.to(dtype)


def _convolve_compiled(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the operator that has no constants of the length; in autocast in the type that torch's own has."""
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    sizes = [list(size) for size in (layer.stride, layer.padding, layer.dilation)]
    return convolution(input, weight, bias, *sizes, layer.groups)
