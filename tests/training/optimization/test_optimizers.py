"""Parameter groups: learning rates and weight decay; Muon's groups; optimizers that are made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, EncoderDecoderConfig, EncoderDecoderModel

from toolkit.models.backbone import stack_layers
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.optimization.learning_rate_layers import places
from toolkit.training.optimization.optimizers import client_optimizer, muon_rate, parameter_groups

SMALL: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2},
    "bart": {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "mbart": {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "m2m_100": {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "pegasus": {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "marian": {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "longt5": {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2},
}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}


def backbone_of(family: str) -> nn.Module:
    if family == "bert+gpt2":
        bert = AutoConfig.for_model(
            "bert", vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
        )
        gpt2 = AutoConfig.for_model(
            "gpt2", vocab_size=20, n_embd=8, n_layer=2, n_head=2, is_decoder=True, add_cross_attention=True
        )
        return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2))
    heads = {} if "t5" in family else {**HEADS, "pad_token_id": 0}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, vocab_size=20, **SMALL[family], **heads))


class Translator(nn.Module):
    """As much of a translator as parameter groups read."""

    def __init__(self, family: str = "t5") -> None:
        super().__init__()
        self.backbone = backbone_of(family)
        self.pose_encoder = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))


@pytest.mark.parametrize("family", [*SMALL, "bert+gpt2"])
def test_every_familys_layers_are_found_and_counted_from_the_top(family: str) -> None:
    model = Translator(family)
    where = places(model)
    backbone: Any = model.backbone
    assert where.keys() == {f"backbone.{name}" for name, _ in backbone.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for stack, depth in ((backbone.get_encoder(), 3), (backbone.get_decoder(), 2)):
        layers = stack_layers(stack)
        assert len(layers) == depth
        for number, layer in enumerate(layers):
            assert {where[names[id(p)]].above for p in layer.parameters()} == {depth - 1 - number}
    tokens = [names[id(p)] for p in backbone.get_input_embeddings().parameters()]
    assert all(where[name].embedding and where[name].above == 3 and not where[name].in_layer for name in tokens)


def test_layer_decay_lowers_the_rate_of_deeper_layers(resolve: Callable[..., ResolvedRun]) -> None:
    model = Translator("t5")
    resolved = resolve("training.learning_rate=1", "training.layer_decay=0.5")
    rates = {id(p): group["lr"] for group in parameter_groups(model, resolved) for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["backbone.encoder.block.2.layer.0.SelfAttention.q.weight"] == 1.0
    assert by_name["backbone.encoder.block.0.layer.0.SelfAttention.q.weight"] == 0.25
    assert by_name["backbone.decoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5
    assert by_name["backbone.shared.weight"] == 0.125
    assert by_name["backbone.encoder.final_layer_norm.weight"] == 1.0
    assert by_name["pose_encoder.0.weight"] == 1.0


def test_norms_and_biases_do_not_decay_and_the_pose_encoder_has_its_own_rate(
    resolve: Callable[..., ResolvedRun],
) -> None:
    model = Translator("bart")
    model.pose_encoder[1].weight.requires_grad_(False)
    resolved = resolve("training.pose_encoder_learning_rate=5e-3", "training.weight_decay=0.1")
    groups = parameter_groups(model, resolved)
    members = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in members
            continue
        group = members[id(parameter)]
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
        assert (group["lr"] == 5e-3) == name.startswith("pose_encoder."), name
        assert group["name"] == ("fresh" if name.startswith("pose_encoder.") else "backbone")
    assert all(group["params"] for group in groups)


def test_muon_steps_hidden_matrices_and_no_embeddings(resolve: Callable[..., ResolvedRun]) -> None:
    model = Translator("t5")
    resolved = resolve("training.optimizer=muon", "training.gradient_clipping=0")
    groups = parameter_groups(model, resolved)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in groups if group["use_muon"] for p in group["params"]}
    assert "backbone.encoder.block.0.layer.0.SelfAttention.q.weight" in muon
    assert not any("shared" in name or "relative" in name or "norm" in name or "pose" in name for name in muon)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_muons_update_is_as_large_as_adamws(shape: tuple[int, int]) -> None:
    original = pytest.importorskip("deepspeed.runtime.zero.muon.original_muon")
    torch.manual_seed(0)
    torch.compiler.set_stance("force_eager")
    update = original.muon_update(torch.randn(shape), torch.zeros(shape)) * muon_rate(shape)
    torch.compiler.set_stance("default")
    # Five Newton-Schulz iterations leave singular values between about 0.7 and 1.2.
    assert 0.12 < update.square().mean().sqrt().item() < 0.26


@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion"])
def test_optimizers_of_bitsandbytes_train_on_a_cpu(resolve: Callable[..., ResolvedRun], optimizer: str) -> None:
    torch.manual_seed(0)
    make = client_optimizer(resolve(f"training.optimizer={optimizer}", "training.learning_rate=1e-2"))
    assert make is not None
    weight = nn.Parameter(torch.randn(8192))
    made = make([{"params": [weight], "lr": 1e-2, "weight_decay": 0.0, "name": "fresh"}])
    before = weight.detach().square().sum().item()
    for _ in range(20):
        made.zero_grad()
        weight.square().sum().backward()
        made.step()
    assert weight.detach().square().sum().item() < 0.8 * before


def test_deepspeed_makes_adamw_itself(resolve: Callable[..., ResolvedRun]) -> None:
    assert client_optimizer(resolve()) is None
