"""Attention with dropout in the dtype of the run, for training on the CPU.

With dropout, or with position biases that are trained, torch has no fused kernel there: it computes in fp32 and draws a
random number per weight, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from toolkit.cpu.dropout import draw_kept, drop

NAME = "cpu_sdpa"  # in transformers' registry of attention functions


def cpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention (Vaswani et al. 2017), as transformers calls it.

    Without dropout, on GPUs, and with shared keys, a cache or a softcap it calls torch's own.

    Args:
        module: the attention layer.
        query: [clips, heads, queries, width].
        key: [clips, heads, keys, width].
        value: [clips, heads, keys, width].
        attention_mask: bool, false for positions that are hidden, or added to the scores; broadcasts to [clips, heads,
            queries, keys].
        dropout: share of the weights that are dropped.
        scaling: of the scores; by default one over the root of the width.
        is_causal: without a mask, queries attend to no later key; by default as the layer says.
        position_bias: added to the scores; broadcasts like the mask.
        more: other arguments of torch's own.

    Returns:
        [clips, queries, heads, width], and None for the weights.
    """
    is_special = query.shape[:2] != key.shape[:2] or any(more.get(name) is not None for name in ("cache", "softcap"))
    if not dropout or query.device.type != "cpu" or is_special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **more
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros(attention_mask.shape).masked_fill_(~attention_mask, lowest)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended: Tensor = _Attention.apply(query, key, value, position_bias, attention_mask, scaling, dropout)
    return attended.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Products in the type of the run, the softmax in fp32."""

    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scaling: float,
        p: float,
    ) -> Tensor:
        shape = (*query.shape[:3], key.shape[2])
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            scores = torch.bmm(query, key.mT).view(shape).float().mul_(scaling)
            if bias is not None:
                scores += bias.float()
            if mask is not None:
                scores += mask
            weights = scores.softmax(dim=-1).to(value.dtype)
            kept = draw_kept(weights, p)
            attended = torch.bmm(drop(weights, kept, p).flatten(0, 1), value)
        context.save_for_backward(query, key, value, weights, kept)
        context.scaling, context.p, context.bias = scaling, p, bias is not None and (bias.shape, bias.dtype)
        return attended.view(*shape[:3], -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, kept = context.saved_tensors
        heads, gradient = weights.shape[:2], gradient.flatten(0, 1)
        for_value = torch.bmm(drop(weights, kept, context.p).flatten(0, 1).mT, gradient)
        slopes = drop(torch.bmm(gradient, value.mT).view_as(weights), kept, context.p)
        slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
        for_bias = None
        if context.bias and context.needs_input_grad[3]:
            shape, dtype = context.bias
            for_bias = slopes.sum_to_size(shape).to(dtype)
        slopes = slopes.flatten(0, 1)
        for_query, for_key = torch.bmm(slopes, key), torch.bmm(slopes.mT, query)
        if context.scaling != 1:
            for_query, for_key = for_query.mul_(context.scaling), for_key.mul_(context.scaling)
        products = (states.unflatten(0, heads) for states in (for_query, for_key, for_value))
        return *products, for_bias, None, None, None


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Have a backbone that calls torch's attention call this one."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, cpu_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME
