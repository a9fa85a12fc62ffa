"""A backbone with quick layers trains as it did without, and evaluates to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from toolkit.cpu import attention, dropout
from toolkit.cpu.attention import NAME
from toolkit.cpu.layers import use_cpu_layers

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
BART = {
    "d_model": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    **{f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in
       {"layers": 2, "ffn_dim": 64, "attention_heads": 4}.items()},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "t5": {**T5, "decoder_start_token_id": 0, "dropout_rate": 0.1},
    "umt5": {**T5, "decoder_start_token_id": 0, "dropout_rate": 0.1},
    "bart": {**BART, "attention_dropout": 0.1},
}


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **MODELS[name])).to(dtype)


def loss_of(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(2, 6, 32, generator=generator).to(model.dtype)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    labels = torch.randint(3, 50, (2, 5), generator=generator)
    return model(inputs_embeds=states, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_bitwise_the_same(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        own, quick = make(name, dtype).eval(), make(name, dtype).eval()
        use_cpu_layers(quick)
        assert quick.config._attn_implementation == NAME
        assert torch.equal(loss_of(own), loss_of(quick))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_when_nothing_happens_to_be_dropped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, dropout):
        monkeypatch.setattr(module, "draw_kept", lambda like, p: torch.ones_like(like))
        monkeypatch.setattr(module, "drop", lambda values, kept, p: values)
    own, quick = make(name).eval(), make(name).train()
    use_cpu_layers(quick)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda values, *_, **__: values)
    losses = [loss_of(own), loss_of(quick)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    theirs = dict(own.named_parameters())
    for parameter_name, parameter in quick.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[parameter_name].grad, atol=1e-6, rtol=1e-4)


def test_a_model_that_was_trained_is_saved_as_any_other(tmp_path: Any) -> None:
    model = make("t5")
    use_cpu_layers(model)
    model.save_pretrained(tmp_path)
    assert "quick" not in (tmp_path / "config.json").read_text().lower()
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
