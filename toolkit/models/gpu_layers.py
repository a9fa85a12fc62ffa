"""T5's layers and low-rank adapters with fewer operator calls, for GPUs.

A small kernel takes less time there than its launch from Python. Weights, names and results stay. Compiled layers can
be made of them as well.
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
_GELUS = ("NewGELUActivation",)  # of gated T5, mT5, ByT5, UMT5, GPT-2
_LORAS = ("Linear", "Linear4bit", "Linear8bitLt")  # PEFT's, around layers of torch, transformers and bitsandbytes
_FEED_FORWARDS = tuple(
    f"{family}Dense{kind}" for family in ("LongT5", "MT5", "T5", "UMT5") for kind in ("ActDense", "GatedActDense")
)


class FusedRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019) by torch; mixed into a class of transformers'."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Scale states [..., width] to a mean square of one, then by the weight."""
        if self.weight.dtype == torch.float32:
            hidden_states = hidden_states.float()  # narrower in autocast; transformers' own computes in fp32, too
        if hidden_states.dtype != self.weight.dtype:
            own: Tensor = super().forward(hidden_states)
            return own
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class FusedGELU(nn.Module):
    """GELU by its approximation with tanh (Hendrycks and Gimpel 2016) in one call; mixed into a class of transformers'.

    transformers' own is eight calls, whose results autograd keeps, and one of them is a power: fp32 in autocast, as are
    then all that follow.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the shape and type of ``x``."""
        return functional.gelu(x, approximate="tanh")


class ReluDropout(torch.autograd.Function):
    """Dropout of a ReLU, whose gradient follows from what they return: above zero is what both have let through.

    torch keeps the ReLU's result and the mask of dropout besides, and compiled layers the masks of both.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, p: float) -> Tensor:
        result = functional.dropout(functional.relu(x), p)
        context.save_for_backward(result)
        context.scale = 1 / (1 - p)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = context.saved_tensors
        return torch.where(result > 0, gradient * context.scale, 0.0), None


class FlatFeedForward(nn.Module):
    """The feed-forward half of a layer, on rows; mixed into a class of transformers'.

    A linear layer views a tensor of more dimensions as rows, and its result back, each time that it is called.
    """

    act: Any
    dropout: Any
    wi: Any
    wi_0: Any
    wi_1: Any
    wo: Any
    counts_as_compiled: bool = False  # without a compiler, in a pass that is traced for a plan

    def forward(self, hidden_states: Tensor) -> Tensor:
        """States [..., width] to states of the same shape."""
        rows = hidden_states.flatten(0, -2)
        in_autocast = _is_in_autocast(rows)
        if self.keeps_one():
            inner: Tensor = ReluDropout.apply(self.wi(rows), self.dropout.p)
        elif in_autocast:
            gated = hasattr(self, "wi_1")
            inner = self.dropout(self.act(self.wi_0(rows)) * self.wi_1(rows) if gated else self.act(self.wi(rows)))
        else:
            own: Tensor = super().forward(rows)
            return own.view(hidden_states.shape)
        # transformers' own casts to the type of the last weight, also in autocast, whose product casts back.
        mixed: Tensor = self.wo(inner if in_autocast else inner.to(self.wo.weight.dtype))
        return mixed.view(hidden_states.shape)

    def keeps_one(self) -> bool:
        """Whether activation and dropout together are to keep one tensor for the backward pass."""
        is_plain = isinstance(getattr(self, "act", None), nn.ReLU) and hasattr(self, "wi")
        # As they are written the calls of Python cost more.
        is_compiled = torch.compiler.is_compiling() or self.counts_as_compiled
        return is_plain and self.training and 0 < self.dropout.p < 1 and is_compiled


class WidenedProduct(torch.autograd.Function):
    """``x @ weight.T + narrow @ upper.T`` as one product, of states and weights that lie beside each other.

    Two products and a sum of them write and read the wide result four times more. The weight is frozen.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, narrow: Tensor, weight: Tensor, upper: Tensor) -> Tensor:
        context.save_for_backward(narrow, weight, upper)
        return torch.cat([x, narrow], dim=1) @ torch.cat([weight, upper], dim=1).t()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        narrow, weight, upper = context.saved_tensors
        both = gradient @ torch.cat([weight, upper], dim=1)
        of_x, of_narrow = both.split([weight.shape[1], upper.shape[1]], dim=1)
        return of_x, of_narrow, None, gradient.t() @ narrow


class LowRankLinear(nn.Module):
    """A linear layer with a low-rank adapter (LoRA, Hu et al. 2021), mixed into a class of PEFT's.

    PEFT scales what the adapter adds and then adds it, both over states as wide as the layer. Here the few numbers of
    the low rank are scaled, or what they are made of, and one product makes the sum.
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_bias: dict[str, bool]
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def forward(self, x: Tensor, *inputs: Any, **settings: Any) -> Tensor:
        """As PEFT's own, which is called for variants such as DoRA, biases and anything but one adapter."""
        has_others = len(self.active_adapters) != 1 or self.lora_variant or inputs or settings
        if self.disable_adapters or self.merged or has_others or self.lora_bias[self.active_adapters[0]]:
            own: Tensor = super().forward(x, *inputs, **settings)
            return own
        (name,) = self.active_adapters
        lower, upper, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
        in_autocast = _is_in_autocast(x)
        states = self.lora_dropout[name](x if in_autocast else _in_type(x, lower.get_parameter("weight").dtype))
        # The compiler scales while it drops out.
        narrow = lower(states * scale) if torch.compiler.is_compiling() else lower(states) * scale
        if self.is_one_product(upper, x, in_autocast):
            weights = [_in_type(layer.get_parameter("weight"), narrow.dtype) for layer in (self.base_layer, upper)]
            rows = _in_type(x.flatten(0, -2), narrow.dtype)
            return WidenedProduct.apply(rows, narrow.flatten(0, -2), *weights).view(*x.shape[:-1], -1)
        base = self.base_layer(x)
        return _in_type(base + upper(narrow), base.dtype)

    def is_one_product(self, upper: nn.Module, x: Tensor, in_autocast: bool) -> bool:
        """Whether both weights can be read, are aligned, the layer's own is frozen, and joining moves less memory."""
        if not (self.training and _is_bare(self.base_layer) and _is_bare(upper)):
            return False
        own, narrow = self.base_layer.get_parameter("weight"), upper.get_parameter("weight")
        is_alike = in_autocast or x.dtype == own.dtype == narrow.dtype
        return is_alike and not own.requires_grad and narrow.shape[1] % 8 == 0 and _are_worth_joining(x, own)


def _are_worth_joining(x: Tensor, weight: Tensor) -> bool:
    """Whether one product moves less memory than two and their sum.

    Of each result it spares four passes forward and one backward. States are copied beside others once, weights
    forward and backward, and a copy reads and writes. Layers that run compiled have many rows, which are not compared:
    the compiler would make a graph for few and another one for many.
    """
    results, states = weight.shape
    spared = 5 * results - 2 * states
    is_wide = spared > 0
    return is_wide and (torch.compiler.is_compiling() or x.numel() // states * spared > 4 * weight.numel())


class SummedOverClips(torch.autograd.Function):
    """A bias with the mask of each clip, whose gradient goes to what all clips share: what is masked has none.

    Layers that share a bias would add up gradients as large as all their scores, and the last of them sum over clips.
    """

    @staticmethod
    def forward(context: Any, shared: Tensor, masked: Tensor) -> Tensor:
        return masked.view_as(masked)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.sum(0, keepdim=True), None


class SharedBiasAttention(nn.Module):
    """Attention whose position bias holds the mask; mixed into a class of transformers'.

    The first layer of a stack makes the bias, the others get it. transformers adds the mask in every layer again, and
    to the cross-attention, which has no position bias, a tensor of zeros for each pair of positions. Projections of the
    same states are one product.
    """

    config: Any
    is_causal: bool
    n_heads: int
    key_value_proj_dim: int
    inner_dim: int
    dropout: float
    scaling: float
    has_relative_attention_bias: bool
    compute_bias: Any
    q: Any
    k: Any
    v: Any
    o: Any

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, which is called where tokens are generated and where the mask is not boolean.

        Compiled layers hand on the trained bias of all clips and, beside it, that with the mask of each.
        """
        is_plain = past_key_values is None and self.config._attn_implementation == "sdpa"
        if not is_plain or (mask is not None and mask.dtype != torch.bool):
            return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)
        if position_bias is None:
            position_bias = self.masked_bias(hidden_states, mask, key_value_states)
        bias = SummedOverClips.apply(*position_bias) if isinstance(position_bias, tuple) else position_bias
        if key_value_states is None:
            query, key, value = self.projected(hidden_states, self.q, self.k, self.v)
        else:
            (query,), (key, value) = (
                self.projected(hidden_states, self.q),
                self.projected(key_value_states, self.k, self.v),
            )
        attended = biased_attention(query, key, value, bias, self.dropout if self.training else 0.0, self.scaling)
        output = self.o(attended.transpose(1, 2).reshape(-1, self.inner_dim))
        return output.view(hidden_states.shape), position_bias, None

    def projected(self, states: Tensor, *layers: nn.Module) -> list[Tensor]:
        """What each of these linear layers makes of states [clips, positions, width], by heads.

        Weights that can be read are joined for one product; those that adapters, quantisation or hooks stand before
        (ZeRO stage 3 gathers them there) are multiplied one by one.

        Returns:
            of each layer [clips, heads, positions, width of a head].
        """
        rows = states.flatten(0, 1)
        if len(layers) > 1 and all(map(_is_bare, layers)):
            products = [functional.linear(rows, torch.cat([layer.get_parameter("weight") for layer in layers]))]
        else:
            products = [layer(rows) for layer in layers]
        by_heads = [part.view(*states.shape[:2], -1, self.key_value_proj_dim) for part in products]
        parts = by_heads if len(by_heads) == len(layers) else by_heads[0].split(self.n_heads, dim=2)
        return [part.transpose(1, 2) for part in parts]

    def masked_bias(
        self, hidden_states: Tensor, mask: Tensor | None, key_value_states: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What is added to the scores: broadcasts to [clips, heads, queries, keys]; or what trains of it, and that."""
        queries = hidden_states.shape[1]
        keys = queries if key_value_states is None else key_value_states.shape[1]
        device = hidden_states.device
        # In autocast each layer would cast what is added to all of its scores.
        kind = _autocast_type(hidden_states) if _is_in_autocast(hidden_states) else hidden_states.dtype
        if self.has_relative_attention_bias:
            bias = self.compute_bias(queries, keys, device=device).to(kind)
        else:
            bias = torch.zeros((), dtype=kind, device=device)
        if mask is None and not (self.is_causal and key_value_states is None and queries > 1):
            return bias.expand(1, self.n_heads, queries, keys).contiguous()
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        # Attention may compute in bf16, where the least number of fp32 would become minus infinity.
        least = max(torch.finfo(bias.dtype).min, torch.finfo(torch.bfloat16).min)
        masked = torch.where(mask, bias, least).contiguous()  # the table of biases gives the heads last
        # As they are written, layers would sum and add by as many kernels.
        is_shared = bias.requires_grad and len(bias) == 1 < len(masked)
        return (bias, masked.detach()) if is_shared and torch.compiler.is_compiling() else masked


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float, scale: float) -> Tensor:
    """Attention [clips, heads, queries, width] with what is added to its scores, by torch.

    Where sizes are symbols of the compiler, torch does not know whether rows of the bias are aligned, as its kernel
    wants them, and copies it into wider rows in every layer, with its gradient in turn. Eight numbers are aligned.
    """
    is_aligned = torch.compiler.is_compiling() and query.is_cuda and bias.shape[-1] % 8 == 0 == query.shape[-1] % 8
    if is_aligned and query.dtype == key.dtype == bias.dtype:
        whole = bias.expand(len(query), query.shape[1], query.shape[2], key.shape[2])
        attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, whole, True, dropout, False, scale=scale
        )[0]
        return attended
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)


def _is_in_autocast(states: Tensor) -> bool:
    kind = states.device.type
    # The compiler answers it while it traces, unlike `is_autocast_available`. Meta tensors have no autocast.
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _autocast_type(states: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(states.device.type)


def _is_bare(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of torch, without bias, whose weight is all that it multiplies by."""
    return type(layer) is nn.Linear and layer.bias is None and not (layer._forward_hooks or layer._forward_pre_hooks)


def use_gpu_layers(model: nn.Module) -> None:
    """Have T5 and its kin, and low-rank adapters of any model, compute their layers in few calls."""
    for module in model.modules():
        own = type(module)
        for names, mixed in (
            (_NORMS, FusedRMSNorm),
            (_GELUS, FusedGELU),
            (_ATTENTIONS, SharedBiasAttention),
            (_FEED_FORWARDS, FlatFeedForward),
        ):
            if own.__name__ in names:
                module.__class__ = _class_of(mixed, own)
        if own.__name__ in _LORAS and hasattr(module, "lora_A"):
            module.__class__ = _class_of(LowRankLinear, own)


_classes: dict[tuple[type, type], type] = {}


def _class_of(mixed: type, own: type) -> type:
    """One class for all layers that are alike: a graph of the compiler belongs to the classes of its layers."""
    if (mixed, own) not in _classes:
        _classes[mixed, own] = type(f"GPU{own.__name__}", (mixed, own), {})
    return _classes[mixed, own]
