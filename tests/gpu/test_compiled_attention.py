"""Attention of compiled layers reads its bias where it lies, whatever the compiler knows of its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from toolkit.cluster.devices import choose_device
from toolkit.models.gpu_layers import biased_attention

aten = torch.ops.aten


def attend(keys: int, attention: Any, kind: torch.dtype) -> list[Tensor]:
    """Result and gradients for random states and a trained bias of so many queries and keys."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", kind).requires_grad_()

    inputs = [random(2, keys, 4, 16) for _ in range(3)]
    bias = random(2, 4, keys, keys)
    result = attention(*(states.transpose(1, 2) for states in inputs), bias, 0.0, 1.0)
    result.square().sum().backward()
    gradients = [tensor.grad for tensor in (*inputs, bias)]
    assert all(gradient is not None for gradient in gradients)
    return [result.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_bias_of_whole_eights_is_not_copied(kind: torch.dtype) -> None:
    choose_device("cuda")  # with the kernels of a run
    seen: list[set[Any]] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Any:
        seen.append({node.target for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(biased_attention, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=note))
    copied = []
    for keys in (24, 40, 32, 20):
        for found, expected in zip(attend(keys, compiled, kind), attend(keys, biased_attention, kind), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 if kind == torch.bfloat16 else 1e-4)
        copied.append(any(aten.constant_pad_nd.default in operators for operators in seen))
        assert len(seen) >= 2, "forward and backward"
    torch._dynamo.reset()
    assert copied == [False, False, False, True]
    assert any(aten._scaled_dot_product_efficient_attention_backward.default in operators for operators in seen)
