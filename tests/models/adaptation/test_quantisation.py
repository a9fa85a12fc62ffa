"""Packed layers answer nearly as whole ones, on the CPU too, and what stays whole does."""

from __future__ import annotations

import re
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BartConfig, PreTrainedModel, T5Config
from transformers import PreTrainedConfig as Configuration

from toolkit.models.adaptation.quantisation import is_packed, mark_quantised
from toolkit.models.backbone import stack_layers
from toolkit.models.loading import backbone_weights
from toolkit.models.loading.backbone_weights import Placement, random_backbone
from toolkit.models.loading.weights import count_weights
from toolkit.recipe.sections.model import Quantization

CONFIGS: dict[str, Configuration] = {
    "t5": T5Config(
        **{"vocab_size": 100, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2},
        decoder_start_token_id=0,
        dropout_rate=0.0,
    ),
    "bart": BartConfig(
        **{"vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0},
        **{"encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
}
# Largest relative error of the logits: four bits of random numbers lose more than eight.
LARGEST_ERROR = {"int8": 0.05, "nf4": 0.25}


def make(architecture: str, kind: str | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    quantization = Quantization.model_validate({"kind": kind}) if kind else None
    placement = Placement(dtype, torch.device("cpu"), None, quantization)
    return random_backbone(CONFIGS[architecture], placement, seed=1)


def logits(model: PreTrainedModel) -> Tensor:
    vectors = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3)).to(model.dtype)
    return model(inputs_embeds=vectors, decoder_input_ids=torch.arange(8)[None].expand(2, -1)).logits.detach().float()


def packed(model: PreTrainedModel) -> set[str]:
    return {name.removesuffix(".weight") for name, parameter in model.named_parameters() if is_packed(parameter)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_it_answers_nearly_as_the_whole_model(architecture: str, kind: str, dtype: torch.dtype) -> None:
    whole, small = logits(make(architecture, None).eval()), make(architecture, kind, dtype)
    before = logits(small.train())
    assert (before - whole).norm() < LARGEST_ERROR[kind] * whole.norm()
    # An evaluation in between leaves the weights as they were.
    assert torch.allclose(logits(small.eval()), before, rtol=1e-2, atol=1e-2 * whole.abs().max())
    assert torch.equal(logits(small.train()), before)


def test_linear_layers_are_packed_and_frozen_and_nothing_else() -> None:
    for architecture in CONFIGS:
        model = make(architecture, "nf4")
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert packed(model) == linear - {"lm_head"}
        assert not any(model.get_parameter(f"{name}.weight").requires_grad for name in packed(model))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_input_embeddings().weight.requires_grad
        assert count_weights(model.parameters()) == count_weights(make(architecture, None).parameters())


def test_one_rank_of_a_node_shows_how_many_weights_are_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtOnce(tqdm):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"delay": 0, "mininterval": 0})

    monkeypatch.setattr(backbone_weights, "tqdm", AtOnce)
    model = make("t5", "nf4")
    shares = re.findall(r"(\d+)%", capsys.readouterr().err)
    assert shares[-1] == "100" and len(set(shares)) >= len(stack_layers(model.encoder)) + len(
        stack_layers(model.decoder)
    )
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    make("t5", "nf4")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("quantization", [{"kind": "int8"}, {"kind": "nf4", "compute_dtype": "fp16"}])
def test_what_overflows_in_fp16_stays_whole_where_packed_layers_compute_in_it(quantization: dict[str, str]) -> None:
    placement = Placement(torch.bfloat16, torch.device("cpu"), None, Quantization.model_validate(quantization))
    model = random_backbone(CONFIGS["t5"], placement, seed=1)
    assert {name.rpartition(".")[2] for name in packed(model)} == {"q", "k", "v", "o", "wi"}


def test_four_bits_are_disguised_as_the_type_of_the_run() -> None:
    model = make("t5", "nf4", torch.bfloat16)
    weight = model.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert weight.dtype == torch.bfloat16
    assert weight.numel() * weight.element_size() == 64 * 128 / 2
    assert weight.quant_state.nested, "scaling factors are packed, too"
    plain = Quantization(kind="nf4", double_quantization=False)
    single = random_backbone(CONFIGS["t5"], Placement(torch.bfloat16, torch.device("cpu"), None, plain), seed=1)
    weight = single.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert not weight.quant_state.nested


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_of_the_right_kind_train_on_top(kind: str) -> None:
    model = make("t5", kind, torch.bfloat16)
    mark_quantised(model, Quantization.model_validate({"kind": kind}))
    model.add_adapter(LoraConfig(r=2, target_modules=["q", "wo"], init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    query = model.encoder.block[0].layer[0].SelfAttention.q
    expected = bitsandbytes.nn.Linear4bit if kind == "nf4" else bitsandbytes.nn.Linear8bitLt
    assert isinstance(query.base_layer, expected) and "bnb" in type(query).__module__
    vectors = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    model(inputs_embeds=vectors, decoder_input_ids=torch.arange(4)[None].expand(2, -1)).logits.float().sum().backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert adapters and all(bool(parameter.grad.isfinite().all()) for parameter in adapters)
