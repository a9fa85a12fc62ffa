"""Which weights of a language model are split over ranks, and models that do not divide."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig, T5Config

from tests.small_configs import T5, translator_config
from toolkit.errors import UserError
from toolkit.models import PoseTranslator
from toolkit.models.language_models.tensor_plan import check_division, partition_plan, split_weights
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def config_of(kind: str, **changed: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **SIZES | changed)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_matrices_of_each_layer_are_split_and_nothing_else(kind: str) -> None:
    check_division(config_of(kind), 2, kind)
    translator = PoseTranslator(translator_config(config_of(kind)))
    plan = partition_plan(translator.backbone)
    assert plan["vocab_parallel_lm_head"] is False
    planned: dict[str, str] = {}
    for name, weight in translator.named_parameters():
        specs = plan["partition_config"]["layer_specs"]
        found = [spec for spec in specs if any(re.match(pattern, name) for pattern in spec["patterns"])]
        is_matrix = re.search(r"^backbone\.model\.layers\..*_proj\.weight$", name) is not None
        is_norm_of_heads = name.endswith(("q_norm.weight", "k_norm.weight"))
        assert len(found) == is_matrix + is_norm_of_heads, name
        if is_matrix:
            planned[name] = found[0]["partition_type"]
        if is_norm_of_heads:
            assert found[0]["partition_type"] == "skip" and found[0]["grad_allreduce"]
        assert weight.dim() == 2 or not is_matrix
    assert {name.split(".")[-2] for name, style in planned.items() if style == "row"} == {"o_proj", "down_proj"}
    assert len(planned) == 7 * SIZES["num_hidden_layers"]
    split = {id(weight) for weight in split_weights(translator)}
    names = {name for name, weight in translator.named_parameters() if id(weight) in split}
    biases = {name for name in names if name.endswith(".bias")}
    assert names - biases == planned.keys()
    assert all(planned[name.removesuffix("bias") + "weight"] == "column" for name in biases)
    assert bool(biases) == (kind == "qwen2")


@pytest.mark.parametrize(
    ("config", "size", "word"),
    [
        (config_of("qwen2"), 4, "num_key_value_heads=2"),
        (config_of("llama", num_key_value_heads=4), 8, "num_attention_heads=4"),
        (config_of("qwen3", intermediate_size=49), 2, "intermediate_size=49"),
        (T5Config(**T5), 2, "mine, a t5"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(config: PreTrainedConfig, size: int, word: str) -> None:
    check_division(config, 1, "mine")
    with pytest.raises(UserError) as caught:
        check_division(config, size, "mine")
    assert word in caught.value.message and f"autotp_size={size}" in caught.value.message and caught.value.hint


def test_a_seq2seq_model_has_nothing_to_split() -> None:
    assert split_weights(PoseTranslator(translator_config(T5Config(**T5)))) == []
