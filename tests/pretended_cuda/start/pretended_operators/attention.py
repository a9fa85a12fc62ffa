"""The kernels of scaled dot-product attention, all by the same formula, in float32.

Dropout has a seed, which the backward pass gets: each kernel returns it where the real one returns its generator's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LSE_STEP = 32  # to a multiple of which the efficient kernel fills up


def _probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention [..., queries, keys], and the logarithms of its sums [..., queries].

    A query from which all keys are hidden attends to nothing, and gets 0: CUDA's kernels do so since torch 2.5.
    """
    scores = q.float() @ _for_heads(k, q).transpose(-2, -1) * _scale(q, scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    sees_nothing = scores.isneginf().all(-1)
    lse = torch.logsumexp(scores, -1).masked_fill(sees_nothing, 0.0)
    return scores.softmax(-1).masked_fill(sees_nothing.unsqueeze(-1), 0.0), lse


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for each head of the queries, of which some share one."""
    return x.float().repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3)


def _of_heads(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of keys or values, summed over the heads that share them."""
    return grad.unflatten(-3, (x.shape[-3], -1)).sum(-3).to(x.dtype)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _kept(like: Tensor, p: float, seed: Tensor) -> Tensor | float:
    """Factors of dropout."""
    if p == 0.0:
        return 1.0
    generator = torch.Generator().manual_seed(int(seed.reshape(-1)[0]))
    return (torch.rand(like.shape, generator=generator) >= p).float() / (1 - p)


def _new_seed(p: float) -> Tensor:
    return torch.randint(2**31, ()) if p else torch.zeros((), dtype=torch.long)


def _by_position(x: Tensor) -> Tensor:
    """In memory by position and then by head, as the kernels leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities, lse = _probabilities(q, k, bias, causal, scale)
    seed = _new_seed(p)
    return _by_position((probabilities * _kept(probabilities, p, seed) @ _for_heads(v, q)).to(q.dtype)), lse, seed


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor, p: float, causal: bool, scale: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    probabilities, _ = _probabilities(q, k, bias, causal, scale)
    kept = _kept(probabilities, p, seed)
    grad = grad.float()
    of_kept = grad @ _for_heads(v, q).transpose(-2, -1) * kept
    of_scores = probabilities * (of_kept - (of_kept * probabilities).sum(-1, keepdim=True))
    grads = (
        of_scores @ _for_heads(k, q) * _scale(q, scale),
        of_scores.transpose(-2, -1) @ q.float() * _scale(q, scale),
        (probabilities * kept).transpose(-2, -1) @ grad,
    )
    of_q, of_k, of_v = (_by_position(_of_heads(x, like)) for x, like in zip(grads, (q, k, v), strict=True))
    return of_q, of_k, of_v, None if bias is None else of_scores.sum_to_size(bias.shape).to(bias.dtype)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, causal: bool = False, mask: bool = False, scale: Any = None
) -> Any:
    out, lse, seed = _forward(q, k, v, None, p, causal, scale)
    state = torch.stack([seed, torch.zeros_like(seed)]).to(torch.uint64)
    nothing, offset = torch.empty(0), torch.zeros((), dtype=torch.uint64)
    return out, lse, nothing, nothing.clone(), q.shape[2], k.shape[2], state, offset, nothing.clone()


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, cum_q: Any, cum_k: Any, most_q: Any, most_k: Any,
    p: float, causal: bool, state: Tensor, offset: Any, scale: Any = None,
) -> Any:  # fmt: skip
    return _backward(grad, q, k, v, None, state, p, causal, scale)[:3]


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, wants_lse: bool, p: float = 0.0, causal: bool = False, scale: Any = None
) -> Any:
    out, lse, seed = _forward(q, k, v, bias, p, causal, scale)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % LSE_STEP))
    return out, lse if wants_lse else lse.new_empty(*lse.shape[:2], 0), seed, torch.zeros_like(seed)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Any, lse: Any, seed: Tensor, offset: Any,
    p: float, wanted: list[bool], causal: bool = False, scale: Any = None,
) -> Any:  # fmt: skip
    grads = _backward(grad, q, k, v, bias, seed, p, causal, scale)
    return (*grads[:3], grads[3] if wanted[3] else None)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, wants_lse: bool, p: float = 0.0, causal: bool = False,
    mask: bool = False, scale: Any = None,
) -> Any:  # fmt: skip
    out, lse, seed = _forward(q, k, v, bias, p, causal, scale)
    return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], seed, torch.zeros_like(seed), None


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, seed: Tensor, offset: Any, bias: Any,
    cum_q: Any, cum_k: Any, most_q: Any, most_k: Any, p: float, causal: bool, scale: Any = None,
) -> Any:  # fmt: skip
    return _backward(grad, q, k, v, bias, seed, p, causal, scale)[:3]


KERNELS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
