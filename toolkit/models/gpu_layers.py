"""T5's layers with fewer operator calls, for GPUs: a small kernel takes less time there than its launch from Python.

Weights, names and results stay. Compiled layers can be made of them as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# transformers' classes, which all compute the same.
_NORMS = ("LongT5LayerNorm", "MT5LayerNorm", "T5LayerNorm", "UMT5LayerNorm")
# Their layers share the position bias of the first one.
_ATTENTIONS = ("MT5Attention", "T5Attention")


class FusedRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019) by torch; mixed into a class of transformers'."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Scale states [..., width] to a mean square of one, then by the weight."""
        if hidden_states.dtype != self.weight.dtype:
            own: Tensor = super().forward(hidden_states)
            return own
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class SharedBiasAttention(nn.Module):
    """Attention whose position bias holds the mask; mixed into a class of transformers'.

    The first layer of a stack makes the bias, the others get it. transformers adds the mask in every layer again, and
    to the cross-attention, which has no position bias, a tensor of zeros for each pair of positions.
    """

    config: Any
    is_causal: bool
    n_heads: int
    has_relative_attention_bias: bool
    compute_bias: Any

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, which is called where tokens are generated and where the mask is not boolean."""
        is_plain = past_key_values is None and self.config._attn_implementation == "sdpa"
        if not is_plain or (mask is not None and mask.dtype != torch.bool):
            return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)
        if position_bias is None:
            position_bias = self.masked_bias(hidden_states, mask, key_value_states)
        return super().forward(hidden_states, None, key_value_states, position_bias, None, is_causal=False, **kwargs)

    def masked_bias(self, hidden_states: Tensor, mask: Tensor | None, key_value_states: Tensor | None) -> Tensor:
        """What is added to the scores: broadcasts to [clips, heads, queries, keys]."""
        queries = hidden_states.shape[1]
        keys = queries if key_value_states is None else key_value_states.shape[1]
        device = hidden_states.device
        if self.has_relative_attention_bias:
            bias = self.compute_bias(queries, keys, device=device)
        else:
            bias = torch.zeros((), dtype=hidden_states.dtype, device=device)
        if mask is None and not (self.is_causal and key_value_states is None and queries > 1):
            return bias.expand(1, self.n_heads, queries, keys).contiguous()
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        # Autocast may cast it to bf16, where the least number of fp32 would become minus infinity.
        least = max(torch.finfo(bias.dtype).min, torch.finfo(torch.bfloat16).min)
        return torch.where(mask, bias, least)


def use_gpu_layers(model: nn.Module) -> None:
    """Have T5 and its kin compute normalisation and masks in few calls."""
    for module in model.modules():
        own = type(module)
        for names, mixed in ((_NORMS, FusedRMSNorm), (_ATTENTIONS, SharedBiasAttention)):
            if own.__name__ in names:
                module.__class__ = type(f"GPU{own.__name__}", (mixed, own), {})
