"""A compiled layer with a convolution is compiled once for clips of any length, and computes what torch's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.callback import callback_handler
from torch._functorch import config as gradients
from torch.fx.experimental import _config as sizes

from toolkit.models.encoders.bf16_convolutions import Conv1d, Conv2d
from toolkit.models.encoders.layers import MaskedConvolution

# Of the pose encoders: strided, one filter a channel, and over time and nodes.
KINDS = {
    "strided": (lambda: Conv1d(8, 16, 5, stride=2, padding=2), (3, 8, 21)),
    "depthwise": (lambda: Conv1d(8, 8, 3, padding=1, groups=8), (3, 8, 21)),
    "nodes": (lambda: Conv2d(8, 8, (5, 1), stride=(2, 1), padding=(2, 0), groups=8, bias=False), (3, 8, 21, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_result_and_gradients_are_torchs(kind: str) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    layer, states = make().double(), torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    wanted = [states, *layer.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    results = [way(states) for way in (layer, compiled)]
    torch.testing.assert_close(results[1], results[0])
    of_torch, ours = (torch.autograd.grad(result.square().sum(), wanted) for result in results)
    torch.testing.assert_close(ours, of_torch)


def test_it_computes_in_the_type_of_autocast() -> None:
    layer, states = Conv1d(8, 8, 3, padding=1), torch.randn(2, 8, 9)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.float16):
        found = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)(states)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, layer(states))


@pytest.mark.nightly
def test_one_graph_serves_all_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inductor alone knows: it makes constants of the sizes of torch's convolution when it compiles its gradient."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sizes, "use_duck_shape", False)
    monkeypatch.setattr(gradients, "force_non_lazy_backward_lowering", True)
    compilations: list[Any] = []
    layer = MaskedConvolution(16, 5, 2, 0.1)
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend="inductor")
    callback_handler.register_end_callback(compilations.append)
    try:
        for frames in (144, 72, 96):
            hidden = torch.randn(2, frames, 16, requires_grad=True)
            compiled(hidden, torch.ones(2, frames, dtype=torch.bool))[0].sum().backward()
    finally:
        callback_handler.remove_end_callback(compilations.append)
    assert len(compilations) == 1
