"""Quick dropout does what torch's does, but for which elements chance picks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.cpu.dropout import CPUDropout, draw_kept, use_cpu_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_it_drops_the_share_that_was_asked_for_anywhere(p: float) -> None:
    torch.manual_seed(0)
    dropped = CPUDropout(p)(torch.ones(1000, 1003)) == 0
    deviation = (p * (1 - p)) ** 0.5
    assert dropped.double().mean().item() == pytest.approx(p, abs=4 * deviation / dropped.numel() ** 0.5)
    # The four elements of one draw are as likely to go as any, and do not go together.
    quarters = dropped.flatten()[: dropped.numel() // 4 * 4].view(-1, 4).double()
    assert quarters.mean(0).tolist() == pytest.approx([p] * 4, abs=4 * deviation / len(quarters) ** 0.5)
    assert (quarters.T.corrcoef() - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_is_scaled_like_torchs_and_passes_its_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(7, 11, dtype=dtype, requires_grad=True)
    output = CPUDropout(0.3)(values)
    output.backward(torch.ones_like(output))
    kept = output != 0
    assert 0 < kept.sum() < kept.numel()
    near = {"rtol": torch.finfo(dtype).eps, "atol": 0.0}  # rounded once
    torch.testing.assert_close(output.float(), values.float() * kept / 0.7, **near)
    torch.testing.assert_close(values.grad.float(), kept / 0.7, **near)


@pytest.mark.parametrize("shape", [(7, 11), (4, 8), (1,), (0, 3)])
def test_the_same_elements_stay_in_bf16_as_in_fp32(shape: tuple[int, ...]) -> None:
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        kept.append(draw_kept(torch.empty(shape, dtype=dtype), 0.3))
        assert kept[-1].dtype == dtype and kept[-1].shape == shape
    assert torch.equal(kept[1].float(), kept[0])
    assert shape != (7, 11) or 0 < kept[0].sum() < kept[0].numel()


def test_the_generator_decides_and_evaluation_drops_nothing() -> None:
    layer, values = CPUDropout(0.5), torch.randn(33)
    torch.manual_seed(1)
    first, second = layer(values), layer(values)
    torch.manual_seed(1)
    assert torch.equal(layer(values), first) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(values), values)
    assert layer.train()(torch.empty(0, 3)).shape == (0, 3)


def test_a_models_dropout_layers_and_no_others_are_turned() -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Dropout1d(0.2), nn.Linear(2, 2)))
    use_cpu_dropout(model)
    assert [type(module) for module in model.modules() if "Drop" in type(module).__name__] == [
        CPUDropout,
        nn.Dropout1d,
    ]
    assert model[0].p == 0.2
