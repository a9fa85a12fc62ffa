"""Where the processor knows no bf16, convolutions compute in fp32 and still give, and learn in, the run's precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.cpu import linear
from toolkit.models.encoders.bf16_convolutions import Conv1d, Conv2d

CASES = [(Conv1d, nn.Conv1d, 5, (2, 8, 12)), (Conv2d, nn.Conv2d, (5, 1), (2, 8, 12, 3))]


class Seen(TorchDispatchMode):
    """Notes in which type convolutions are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(function):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("ours", "torchs", "kernel", "shape"), CASES, ids=["1d", "2d"])
@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_the_precision_of_a_run_is_kept(
    monkeypatch: pytest.MonkeyPatch, ours: Any, torchs: Any, kernel: Any, shape: Any, knows: bool, precision: str
) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: knows)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    reference = torchs(8, 8, kernel).to(dtype)
    layer = ours(8, 8, kernel).to(dtype)
    layer.load_state_dict(reference.state_dict())
    values = torch.randn(shape).to(dtype)
    outputs, gradients, seen = [], [], Seen()
    for module in (reference, layer):
        own = values.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            if module is layer:
                with seen:
                    output = module(own)
            else:
                output = module(own)
        output.float().square().sum().backward()
        outputs.append(output)
        gradients.append([own.grad, module.weight.grad, module.bias.grad])
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*(output.float() for output in outputs), rtol=2e-2, atol=2e-2)
    for expected, found in zip(*gradients, strict=True):
        assert expected.dtype == found.dtype
        torch.testing.assert_close(expected.float(), found.float(), rtol=2e-2, atol=6e-2)
    slow = precision != "fp32" and knows
    assert seen.dtypes == {torch.bfloat16 if slow else torch.float32}
