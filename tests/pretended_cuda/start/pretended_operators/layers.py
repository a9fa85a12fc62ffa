"""Operators of layers that only GPUs have, or have in more types: convolutions, norms, dropout, softmax, products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _convolution(
    x: Tensor, weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *algorithm: bool
) -> Tensor:
    return _in_float32(x, weight, None, stride, padding, dilation, False, [0] * len(padding), groups)


def _transposed(
    x: Tensor, weight: Tensor, padding: Any, more: Any, stride: Any, dilation: Any, groups: int, *algorithm: bool
) -> Tensor:
    return _in_float32(x, weight, None, stride, padding, dilation, True, more, groups)


def _depthwise(
    x: Tensor, weight: Tensor, size: Any, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    return _in_float32(x, weight, bias, stride, padding, dilation, False, [0] * len(padding), weight.shape[0])


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    # Sums in a type of half the width would be rounded at each step, which no GPU does.
    bias = None if bias is None else bias.float()
    return aten.convolution(x.float(), weight.float(), bias, *how).to(x.dtype)


def _batch_norm(
    x: Tensor, weight: Tensor, bias: Any, mean: Any, var: Any, training: bool, momentum: float, epsilon: float
) -> Any:
    found = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, epsilon)
    return (*found, torch.empty(0, dtype=torch.uint8))


def _batch_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, mean: Any, var: Any, saved_mean: Any, saved_var: Any, epsilon: float,
    reserve: Tensor,
) -> Any:  # fmt: skip
    wanted = [True, True, True]
    return aten.native_batch_norm_backward(grad, x, weight, mean, var, saved_mean, saved_var, True, epsilon, wanted)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None, epsilon: float | None) -> tuple[Tensor, Tensor]:
    wide, dims = x.float(), _last(shape)
    epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    found = wide * inverse
    return (found if weight is None else found * weight.float()).to(x.dtype), inverse


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, inverse: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    normed, wide, dims = x.float() * inverse, grad.float(), _last(shape)
    of_normed = wide if weight is None else wide * weight.float()
    of_x = inverse * (of_normed - normed * (of_normed * normed).mean(dims, keepdim=True))
    if weight is None:
        return of_x.to(x.dtype), None
    return of_x.to(x.dtype), (wide * normed).sum_to_size(weight.shape).to(weight.dtype)


def _last(shape: Any) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _dropout(x: Tensor, kept: float, generator: Any = None) -> tuple[Tensor, Tensor]:
    mask = torch.rand(x.shape) < kept
    return x * mask / kept, mask.to(torch.uint8)


def _masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return aten._softmax(x.float() if half_to_float else x, dim, False)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return aten._log_softmax(x.float() if half_to_float else x, dim, False)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return aten._softmax_backward_data(grad, output, dim, grad.dtype).to(dtype)


def _log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return aten._log_softmax_backward_data(grad, output, dim, grad.dtype).to(dtype)


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.to(dtype) @ right.to(dtype)


def _addmm(x: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return beta * x.to(dtype) + alpha * _mm(left, right, dtype)


KERNELS = {
    "cudnn_convolution": _convolution,
    "cudnn_convolution_transpose": _transposed,
    "_conv_depthwise2d": _depthwise,
    "conv_depthwise3d": _depthwise,
    "cudnn_batch_norm": _batch_norm,
    "cudnn_batch_norm_backward": _batch_norm_backward,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
    "_fused_dropout": _dropout,
    "_masked_scale": _masked_scale,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "mm.dtype": _mm,
    "bmm.dtype": _mm,
    "addmm.dtype": _addmm,
    "baddbmm.dtype": _addmm,
}
