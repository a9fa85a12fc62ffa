"""Stand-ins for kernels while a pass is traced without memory: they keep for the backward pass what real ones keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.cpu import attention as cpu_attention
from toolkit.cpu import dropout as cpu_dropout
from toolkit.models import gpu_layers

MASK_ALIGNMENT = 8  # numbers, of each dimension of a mask but the last (torch 2.11, `preprocess_mask` of its attention)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output and a number for each query; no scores."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = _added_to_scores(mask, query.dtype)
        output = query.new_empty((*query.shape[:3], value.shape[-1]))
        norms = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        context.save_for_backward(query, key, value, mask, output, norms)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = context.saved_tensors[:4]
        return tuple(
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(inputs, context.needs_input_grad, strict=True)
        )


def _added_to_scores(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as torch hands it to a kernel that takes one: numbers, in rows that the kernel can read.

    Each call makes its own where the mask is boolean or its rows are no multiple of eight long.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=dtype)
    if mask is not None and any(stride % MASK_ALIGNMENT for stride in mask.stride()[:-1]):
        mask = functional.pad(mask, (0, -mask.shape[-1] % MASK_ALIGNMENT or MASK_ALIGNMENT))[..., : mask.shape[-1]]
    return mask


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what a fused normalisation keeps: its input, its weight and a number for each row."""

    @staticmethod
    def forward(context: Any, input: Tensor, weight: Tensor) -> Tensor:
        norms = torch.empty(input.shape[:-1], dtype=torch.float32, device=input.device)
        context.save_for_backward(input, weight, norms)
        return torch.empty_like(input)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = context.saved_tensors
        return torch.empty_like(input), torch.empty_like(weight) if context.needs_input_grad[1] else None


class _Ctc(torch.autograd.Function):
    """Keeps what the CTC kernel keeps: log-probabilities and the forward variables of its lattice."""

    @staticmethod
    def forward(context: Any, log_probabilities: Tensor, tokens: int) -> Tensor:
        positions, clips, _ = log_probabilities.shape
        lattice = torch.empty(clips, positions, 2 * tokens + 1, dtype=torch.float32, device=log_probabilities.device)
        context.save_for_backward(log_probabilities, lattice)
        return log_probabilities.new_empty(clips)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        log_probabilities, lattice = context.saved_tensors
        torch.empty_like(lattice)
        return torch.empty_like(log_probabilities), None


class PackedLinear(nn.Linear):
    """A layer of bitsandbytes: its weight is frozen, and in the type in which it multiplies; bytes of the packed weight
    are counted elsewhere. Its output has the type of its input; int8 keeps the input for the backward pass.
    """

    keeps_input = False

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _PackedProduct.apply(input.to(self.weight.dtype), self.weight, self.keeps_input)
        output = output.to(input.dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _PackedProduct(torch.autograd.Function):
    """bitsandbytes' product: autocast changes no type within it, and no weight in another type is kept."""

    @staticmethod
    def forward(context: Any, input: Tensor, weight: Tensor, keeps_input: bool) -> Tensor:
        context.save_for_backward(weight, *([input] if keeps_input else []))
        with torch.autocast("cpu", enabled=False):
            return torch.mm(input.flatten(0, -2), weight.t()).unflatten(0, input.shape[:-1])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, *_ = context.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return torch.mm(gradient.flatten(0, -2), weight).unflatten(0, gradient.shape[:-1]), None, None


@contextmanager
def as_on_gpu(autocast: bool) -> Iterator[Callable[[], None]]:
    """Within it torch's functions keep on the meta device what they keep on a GPU.

    Yields:
        what is to be called when the forward pass is over, which ends autocast.
    """
    casts: dict[int, Tensor] = {}
    is_forward = True

    def low(tensor: Tensor | None) -> Tensor | None:
        if not autocast or tensor is None or tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(torch.bfloat16)
        # Autocast keeps the copy of a weight while the forward pass lasts, and autograd until the backward pass.
        # A layer that is recomputed makes its own.
        if not is_forward:
            return tensor.to(torch.bfloat16)
        return casts.setdefault(id(tensor), tensor.to(torch.bfloat16))

    def end_forward() -> None:
        nonlocal is_forward
        is_forward = False
        casts.clear()

    def in_low(function: Any) -> Any:
        def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
            result: Tensor = function(low(input), low(weight), low(bias), *rest, **named)
            return result

        return call

    def product(left: Tensor, right: Tensor, **named: Any) -> Tensor:
        result: Tensor = originals["matmul"](low(left), low(right), **named)
        return result

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        return _FusedAttention.apply(low(query), low(key), low(value), attn_mask)

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def layer_norm(input: Tensor, *rest: Any, **named: Any) -> Tensor:
        result: Tensor = originals["layer_norm"](input.float() if autocast else input, *rest, **named)
        return result

    def rms_norm(input: Tensor, shape: Any, weight: Tensor, *_: Any) -> Tensor:
        return _FusedRMSNorm.apply(input, weight)

    def ctc(log_probabilities: Tensor, targets: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Ctc.apply(log_probabilities, len(targets) // log_probabilities.shape[1])

    stand_ins = {
        "linear": in_low(functional.linear),
        "conv1d": in_low(functional.conv1d),
        "conv2d": in_low(functional.conv2d),
        "dropout": dropout,
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
        "scaled_dot_product_attention": attention,
        "ctc_loss": ctc,
    }
    originals = {name: getattr(functional, name) for name in stand_ins} | {"matmul": torch.matmul}
    of_layers = gpu_layers._is_in_autocast, gpu_layers._autocast_type
    try:
        gpu_layers._is_in_autocast = lambda states: autocast  # meta tensors have none
        gpu_layers._autocast_type = lambda states: torch.bfloat16
        for name, stand_in in stand_ins.items():
            setattr(functional, name, stand_in)
        setattr(torch, "matmul", product)  # noqa: B010 - its type says a function of torch
        yield end_forward
    finally:
        for name in stand_ins:
            setattr(functional, name, originals[name])
        setattr(torch, "matmul", originals["matmul"])  # noqa: B010
        gpu_layers._is_in_autocast, gpu_layers._autocast_type = of_layers


@contextmanager
def as_on_cpu(autocast: bool) -> Iterator[Callable[[], None]]:
    """Within it random numbers are not drawn, and the CTC loss keeps what its kernel keeps; all else runs as it is."""

    def draw_kept(like: Tensor, p: float) -> Tensor:
        if like.dtype != torch.bfloat16:  # else they are where the draws were
            torch.empty(like.numel() // 4 + 1, dtype=torch.int64)
        return torch.empty_like(like)

    def ctc(log_probabilities: Tensor, targets: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Ctc.apply(log_probabilities, len(targets) // log_probabilities.shape[1])

    stand_ins: list[tuple[Any, str, Any]] = [
        (cpu_dropout, "draw_kept", draw_kept),
        (cpu_attention, "draw_kept", draw_kept),
        (functional, "ctc_loss", ctc),
    ]
    originals = [getattr(place, name) for place, name, _ in stand_ins]
    try:
        for place, name, stand_in in stand_ins:
            setattr(place, name, stand_in)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            yield lambda: None
    finally:
        for (place, name, _), original in zip(stand_ins, originals, strict=True):
            setattr(place, name, original)
