"""Operators of the pretended GPU give the CPU's numbers, and those that cannot say so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.gpu

FLASH, EFFICIENT, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
# What torch gives to each kernel.
CASES = [
    *((kernel, case) for kernel in (FLASH, EFFICIENT, CUDNN) for case in ("plain", "causal")),
    *((FLASH, "grouped"), (CUDNN, "grouped"), (EFFICIENT, "bias")),
]


def losses(device: str, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    layers = (nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.GELU(), nn.Flatten(), nn.Linear(160, 32))
    model = nn.Sequential(*layers, nn.RMSNorm(32), nn.Linear(32, 5)).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    found = []
    for step in range(5):
        x = torch.randn(8, 4, 10, generator=torch.Generator().manual_seed(step)).to(device, dtype)
        loss = nn.functional.cross_entropy(model(x).float(), torch.arange(8, device=device) % 5)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_model_trains_as_on_the_cpu(dtype: torch.dtype, within: float) -> None:
    assert losses("cuda", dtype) == pytest.approx(losses("cpu", dtype), rel=within)


def attended(device: str, kernel: SDPBackend, more: dict[str, bool], has_bias: bool) -> list[Tensor]:
    torch.manual_seed(0)
    heads = 2 if more.get("enable_gqa") else 4
    q, k, v = (torch.randn(2, number, 6, 8).to(device, torch.bfloat16) for number in (4, heads, heads))
    bias = torch.randn(2, 4, 6, 6).to(device, torch.bfloat16) if has_bias else None
    given = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    with sdpa_kernel(SDPBackend.MATH if device == "cpu" else kernel):
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, **more)
    return [x.detach().float().cpu() for x in (out, *torch.autograd.grad(out.float().square().sum(), given))]


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=lambda value: getattr(value, "name", value))
def test_each_kernel_of_attention_gives_the_cpus_numbers(kernel: SDPBackend, case: str) -> None:
    more = {"causal": {"is_causal": True}, "grouped": {"enable_gqa": True}}.get(case, {})
    has_bias = case == "bias"
    expected = attended("cpu", kernel, more, has_bias)
    for one, other in zip(attended("cuda", kernel, more, has_bias), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_dropout_of_attention_is_the_same_backward() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 8, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    v.requires_grad_()
    with sdpa_kernel(FLASH):
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    (grad,) = torch.autograd.grad(out.float().sum(), v)
    # Linear in the values: the output's sum is that of values times gradients, if both passes drop the same.
    total = (grad.float() * v.detach().float()).sum().item()
    assert total == pytest.approx(out.float().sum().item(), rel=0.02, abs=0.1)


def test_a_number_does_not_change_the_type_of_a_tensor() -> None:
    x = torch.ones((), device="cuda", dtype=torch.bfloat16)
    assert (x * 2.5).dtype == torch.where(x > 0, x, 0.0).dtype == torch.bfloat16
    assert torch.ones((), device="cuda", dtype=torch.int32).add(1).dtype == torch.int32


def test_out_gets_the_shape_of_the_result() -> None:
    x, out = torch.arange(6.0, device="cuda"), torch.empty(0, device="cuda")
    torch.add(x, 1, out=out)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_what_cannot_be_computed_is_an_error_that_names_it() -> None:
    x = torch.ones(2, 3, 4, device="cuda")
    with pytest.raises(NotImplementedError, match="batch_norm_stats"):
        torch.batch_norm_stats(x, 1e-5)
    with pytest.raises(RuntimeError, match="kernel"):  # a kernel of torch's that no operator took the place of
        torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    assert (copy.deepcopy(x) + 1).sum().item() == 48.0


def test_quantised_weights_are_the_cpus() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    found = []
    for device in ("cpu", "cuda"):
        packed, state = functional.quantize_4bit(weight.to(device), quant_type="nf4")
        found.append((packed.cpu(), functional.dequantize_4bit(packed, state).cpu()))
    assert found[0][0].equal(found[1][0]) and found[0][1].equal(found[1][1])
    assert (found[0][1] - weight).abs().max().item() < 1.0
