"""Replays compute what eager passes compute, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from toolkit.decoding.step_graphs import CudaGraphs

pytestmark = pytest.mark.gpu


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(8, 16, 3), nn.Conv1d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(18)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.norm(nn.functional.glu(self.wide(x), 1))).square().mean()


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = T5Config(vocab_size=40, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
        self.inner = T5ForConditionalGeneration(config)
        self.register_buffer("labels", torch.randint(1, 40, (2, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x, labels=self.labels).loss


@pytest.mark.parametrize(("kind", "shape"), [(Translator, (2, 6, 32)), (Convolutions, (3, 8, 20))])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_replay_adds_the_gradients_of_an_eager_pass(kind: type, shape: tuple[int, ...], is_compiled: bool) -> None:
    torch.manual_seed(0)
    model = kind().cuda()
    call = torch.compile(model) if is_compiled else model
    x, other = torch.randn(2, *shape).cuda()
    weights = list(model.parameters())
    sums, scale = [torch.zeros_like(weight) for weight in weights], torch.zeros((), device="cuda")

    def passes() -> Tensor:
        loss = call(x)
        grads = torch.autograd.grad(loss * scale, weights, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(sums, grads)
        return loss.detach()

    loss, replay = CudaGraphs()(passes)
    assert max(total.abs().max().item() for total in sums) == 0
    x.copy_(other)
    scale.fill_(2.0)
    replay()
    found, found_loss = [total.clone() for total in sums], loss.item()
    torch._foreach_zero_(sums)
    assert passes().item() == pytest.approx(found_loss, rel=1e-6)
    for total, expected in zip(found, sums, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-7)
    assert max(total.abs().max().item() for total in found) > 0


def test_a_graph_that_reads_freed_memory_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRETENDED_CUDA_FREED", "1")
    kept, freed = torch.ones(8, device="cuda"), [torch.ones(8, device="cuda")]
    capture = CudaGraphs()
    _, of_kept = capture(lambda: (kept * 2) + 1)
    _, of_freed = capture(lambda: freed[0] * 2)
    freed.clear()
    of_kept()
    with pytest.raises(RuntimeError):
        of_freed()
    assert "freed" in capfd.readouterr().err
