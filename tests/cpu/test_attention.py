"""Quick attention is torch's, but for which weights chance drops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from toolkit.cpu import attention
from toolkit.cpu.attention import cpu_attention

CLIPS, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 5, 7, 4


def inputs(dtype: torch.dtype, keys: int = KEYS) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "query": (CLIPS, HEADS, QUERIES, WIDTH),
        "key": (CLIPS, HEADS, keys, WIDTH),
        "value": (CLIPS, HEADS, keys, WIDTH),
        "position_bias": (1, HEADS, QUERIES, keys),
    }
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def mask_of(kind: str) -> Tensor | None:
    """Nobody looks at the last keys of the second clip."""
    allowed = torch.ones(CLIPS, 1, 1, KEYS, dtype=torch.bool)
    allowed[1, ..., -3:] = False
    masks = {"bool": allowed, "added": torch.zeros(allowed.shape).masked_fill(~allowed, -1e9), "none": None}
    return masks[kind]


def plain(
    query: Tensor, key: Tensor, value: Tensor, position_bias: Tensor, added: Tensor, scaling: float, kept: Tensor
) -> Tensor:
    """What the papers say, with autograd to differentiate it."""
    scores = query.float() @ key.float().mT * scaling + position_bias.float() + added
    weights = functional.softmax(scores, dim=-1) * kept / 0.75
    return (weights @ value.float()).transpose(1, 2)


@pytest.mark.parametrize("scaling", [1.0, None])
@pytest.mark.parametrize("kind", ["bool", "added", "none"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_results_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, near: float, kind: str, scaling: float | None
) -> None:
    kept = torch.rand(CLIPS, HEADS, QUERIES, KEYS) > 0.25
    monkeypatch.setattr(attention, "draw_kept", lambda like, p: kept.to(like.dtype))
    ours, theirs, mask = inputs(dtype), inputs(dtype), mask_of(kind)
    added = torch.zeros(()) if mask is None else mask_of("added")
    layer = SimpleNamespace(is_causal=False)
    output, nothing = cpu_attention(layer, attention_mask=mask, dropout=0.25, scaling=scaling, **ours)
    expected = plain(**theirs, added=added, scaling=scaling or WIDTH**-0.5, kept=kept)
    slopes = torch.randn(expected.shape)
    output.backward(slopes.to(dtype))
    expected.backward(slopes)
    assert nothing is None and output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=near, rtol=near)
    for name, tensor in ours.items():
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(tensor.grad, theirs[name].grad, atol=2 * near, rtol=2 * near)


def test_without_a_mask_a_causal_layer_looks_at_nothing_later() -> None:
    states = {name: tensor.detach() for name, tensor in inputs(torch.float32, keys=QUERIES).items()}
    states |= {"attention_mask": None, "dropout": 0.5}

    def first_query(layer: SimpleNamespace) -> Tensor:
        torch.manual_seed(1)
        return cpu_attention(layer, **states)[0][:, 0]

    causal, all_around = SimpleNamespace(is_causal=True), SimpleNamespace(is_causal=False)
    before = [first_query(causal), first_query(all_around)]
    states["value"][:, :, 1:] += 1.0
    assert torch.equal(first_query(causal), before[0])
    assert not torch.equal(first_query(all_around), before[1])


def test_without_dropout_torch_computes() -> None:
    states, layer = inputs(torch.float32), SimpleNamespace(is_causal=False)
    bias = states.pop("position_bias")
    output, _ = cpu_attention(layer, attention_mask=None, position_bias=bias, **states)
    expected = functional.scaled_dot_product_attention(**states, attn_mask=bias).transpose(1, 2)
    assert torch.equal(output, expected)
