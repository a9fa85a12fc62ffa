"""Convolutions that a compiled layer calls as they are, for any length.

Inductor (torch 2.13) makes constants of the sizes of a convolution whose gradient it compiles, so that a layer would be
compiled again for every length of clips. An operator of our own says nothing of its sizes. Numbers are those of torch's
convolution, which it calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@torch.library.custom_op("toolkit::convolution", mutates_args=())
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """torch's convolution of [clips, channels, ...]; in memory the channels of its result come last."""
    return _channels_last(aten.convolution(input, weight, bias, *_settings(stride, padding, dilation, groups)))


@convolution.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sizes = [
        (size + 2 * padded - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, padded, spread in zip(
            input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return input.new_empty(input.shape[0], *sizes, weight.shape[0]).movedim(-1, 1)


@torch.library.custom_op("toolkit::convolution_gradients", mutates_args=())
def convolution_gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    settings = _settings(stride, padding, dilation, groups)
    of_input, of_weight, of_bias = aten.convolution_backward(
        gradient, input, weight, [weight.shape[0]], *settings, [True, True, True]
    )
    return _channels_last(of_input), of_weight.contiguous(), of_bias


@convolution_gradients.register_fake
def _(gradient: Tensor, input: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_input = input.new_empty(input.shape[0], *input.shape[2:], input.shape[1]).movedim(-1, 1)
    return of_input, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # torch names its arguments
    input, weight, bias, *settings = inputs
    ctx.save_for_backward(input, weight)
    ctx.has_bias, ctx.settings = bias is not None, settings


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    of_input, of_weight, of_bias = convolution_gradients(gradient, input, weight, *ctx.settings)
    return of_input, of_weight, of_bias if ctx.has_bias else None, None, None, None, None


convolution.register_autograd(_backward, setup_context=_keep)


def _settings(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """As torch's operator wants them, of a convolution that is not transposed."""
    return stride, padding, dilation, False, [0 for _ in stride], groups


def _channels_last(tensor: Tensor) -> Tensor:
    """The same numbers, channels last in memory: layers give and take their states in this order."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
