"""Weights drawn one by one are distributed as transformers draws them, and depend on nothing but name and seed."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    GPT2Config,
)
from transformers import PreTrainedConfig as Configuration

from toolkit.models.loading.random_weights import make_skeleton
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
HALVES = {
    f"{half}_{key}": value
    for half in ("encoder", "decoder")
    for key, value in {"layers": 2, "ffn_dim": 64, "attention_heads": 4}.items()
}
BART = {"d_model": 32, "vocab_size": 100, "decoder_start_token_id": 2, **HALVES}
LED = {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
LANGUAGE_MODEL = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "pad_token_id": 0},
}
CONFIGS: dict[str, Configuration] = {
    **{name: AutoConfig.for_model(name, **LANGUAGE_MODEL) for name in LANGUAGE_MODELS},
    **{name: AutoConfig.for_model(name, **T5, decoder_start_token_id=0) for name in ("t5", "mt5", "umt5", "longt5")},
    **{
        name: AutoConfig.for_model(name, **BART, pad_token_id=1, max_position_embeddings=64)
        for name in ("bart", "mbart", "m2m_100", "pegasus", "marian")
    },
    "led": AutoConfig.for_model("led", **BART, **LED),
    "bert-gpt2": EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100),
        GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=100, add_cross_attention=True, is_decoder=True),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_distributed_as_transformers_draws_it(name: str) -> None:
    skeleton = make_skeleton(CONFIGS[name])
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if name in LANGUAGE_MODELS else AutoModelForSeq2SeqLM
    usual = kind.from_config(CONFIGS[name])
    expected = {**dict(usual.named_parameters()), **dict(usual.named_buffers())}
    tensors = {**dict(skeleton.model.named_parameters()), **dict(skeleton.model.named_buffers())}
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        ours, theirs = skeleton.draw(tensor, key, seed=1), expected[key].detach()
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        # Fixed values (norms, biases, sinusoids, the row of the padding token) alike, drawn ones as widely spread.
        assert torch.equal(ours == 0, theirs == 0), key
        if not torch.equal(ours, theirs):
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.3), key
            assert abs(ours.mean() - theirs.mean()) < theirs.std() / 3, key


def test_a_tensor_depends_on_name_and_seed_alone() -> None:
    short, long = make_skeleton(CONFIGS["t5"]), make_skeleton(AutoConfig.for_model("t5", **{**T5, "num_layers": 3}))
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"

    def drawn(skeleton, name, seed):
        return skeleton.draw(skeleton.model.get_parameter(name), name, seed)

    torch.manual_seed(1)
    first = drawn(short, name, 5)
    torch.manual_seed(2)
    drawn(long, name.replace("q.weight", "k.weight"), 5)
    assert torch.equal(first, drawn(long, name, 5))
    assert not torch.equal(first, drawn(short, name, 6))
    assert not torch.equal(first, drawn(short, name.replace("block.1", "block.0"), 5))
    assert torch.initial_seed() == 2


def test_building_leaves_transformers_as_it_was() -> None:
    torch.manual_seed(0)
    before = AutoModelForSeq2SeqLM.from_config(CONFIGS["bart"]).state_dict()
    make_skeleton(CONFIGS["bart"])
    torch.manual_seed(0)
    after = AutoModelForSeq2SeqLM.from_config(CONFIGS["bart"]).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
