"""Model cards: published dimensions that give the published size, tokenizers, and the shrunken configuration."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoConfig

from toolkit.errors import UserError
from toolkit.models.backbone import OF_LANGUAGE_MODELS, empty_backbone, note_published
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS
from toolkit.recipe.load import load_recipe
from toolkit.recipe.model_cards import TINY_LIMITS, card_of, load_model_yaml, model_names, tiny_config, tokenizer_of


def backbone_of(card):
    """The backbone by its published dimensions, without memory."""
    config = AutoConfig.for_model(card.architecture, **card.config)
    note_published(config, card.config)
    return empty_backbone(config)


def count_parameters(card):
    """The backbone's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in backbone_of(card).parameters())


@pytest.mark.parametrize("name", model_names())
def test_the_dimensions_give_the_parameters_that_the_card_states(name):
    card = load_model_yaml(name)
    assert card.name == name
    assert count_parameters(card) == card.parameters, f"recipes/models/{name}.yaml should say {count_parameters(card)}"


# Which tokens frame a text: configurations take them, and those that have none leave them out.
TOKENS = {"decoder_start_token_id", "forced_eos_token_id", "eos_token_id"}


def known_keys(architecture):
    return {"model_type", *AutoConfig.for_model(architecture).to_dict()} | TOKENS


@pytest.mark.parametrize("name", model_names())
def test_every_dimension_is_one_that_transformers_knows(name):
    card = load_model_yaml(name)
    assert set(card.config) <= known_keys(card.architecture)
    halves = [half for half in card.config.values() if isinstance(half, dict)]
    halves += [half["text_config"] for half in halves if "text_config" in half]
    for half in (half for half in halves if "model_type" in half):
        assert set(half) <= known_keys(half["model_type"])


# In millions, as papers, model pages and the published configurations have them.
PUBLISHED = {
    "t5_small": 60.5,
    "t5_base": 222.9,
    "t5_large": 737.7,
    "t5_3b": 2851.6,
    "t5_v1_1_base": 247.6,
    "flan_t5_base": 247.6,
    "byt5_small": 299.6,
    "bart_large": 406.3,
    "mbart50": 610.9,
    "mt5_base": 582.4,
    "mt5_large": 1229.6,
    "m2m100": 483.9,
    "nllb_600m": 615.1,
    "led_base": 161.8,
    "qwen2_5_0_5b": 494.0,
    "qwen2_5_1_5b": 1543.7,
    "qwen2_5_7b": 7615.6,
    "qwen2_5_7b_instruct": 7615.6,
    "qwen2_5_14b": 14770.0,
    "qwen3_0_6b": 596.0,
    "qwen3_4b": 4022.5,
    "qwen3_8b": 8190.7,
    "llama3_2_1b": 1235.8,
    "llama3_1_8b": 8030.3,
    "mistral_7b": 7248.0,
    "gemma2_2b": 2614.3,
    "gemma_7b": 8537.7,
    "t5gemma_2b_2b": 5596.9,
    "t5gemma2_270m": 368.4,  # without its vision tower
    "smollm2_135m": 134.5,
    "smollm2_360m": 361.8,
}
# Sinusoidal tables that never train are parameters to PyTorch: width, positions.
TABLES = {"pegasus_large": (1024, 1024, 568.7), "marian": (512, 512, 73.9)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_are_the_published_ones(name):
    assert round(load_model_yaml(name).parameters / 1e6, 1) == PUBLISHED[name]


@pytest.mark.parametrize("name", TABLES)
def test_the_sizes_without_tables_are_the_published_ones(name):
    width, positions, published = TABLES[name]
    assert round((load_model_yaml(name).parameters - 2 * width * positions) / 1e6, 1) == published


def test_every_promised_backbone_has_a_card():
    assert set(model_names()) >= {*PUBLISHED, *TABLES, "umt5_base", "longt5_base", "transformer", "demo"}


# Beginnings of hub ids that ask for an account with access; what a missing token leads to is test_hub.py's.
GATED = {"meta-llama", "mistralai", "google/gemma", "google/t5gemma"}


@pytest.mark.parametrize("name", model_names())
def test_models_behind_a_gate_say_so_and_every_language_model_names_its_lora_targets(name):
    card = load_model_yaml(name)
    assert card.notes.startswith("Gated") == any((card.hub_id or "").startswith(owner) for owner in GATED)
    if card.architecture in (*LANGUAGE_MODELS, *OF_LANGUAGE_MODELS):
        modules = {path.rpartition(".")[2] for path, _ in backbone_of(card).named_modules()}
        assert set(card.lora_targets) <= modules and {"q_proj", "v_proj"} <= set(card.lora_targets)


@pytest.mark.parametrize("name", model_names())
def test_a_tiny_configuration_is_small_and_of_the_same_architecture(name):
    card = load_model_yaml(name)
    before = copy.deepcopy(card.config)
    tiny = tiny_config(card.architecture, card.config)
    assert card.config == before
    assert tiny.keys() >= card.config.keys()
    words = {"vocab_size": 384, "pad_token_id": 0}
    if "decoder" in tiny:
        words = {half: {**tiny[half], **words} for half in ("encoder", "decoder")}
    if "text_config" in tiny.get("encoder", {}):
        words["encoder"]["text_config"] = {**tiny["encoder"]["text_config"], "vocab_size": 384}
    shrunk = card.model_copy(update={"config": {**tiny, **words}})
    assert count_parameters(shrunk) < 600_000
    unlimited = set(card.config) - set(TINY_LIMITS[card.architecture])
    assert all(tiny[key] == card.config[key] for key in unlimited)


def test_shrinking_never_enlarges():
    assert tiny_config("t5", {"d_model": 32, "num_layers": 1})["d_model"] == 32
    assert tiny_config("t5", {"d_model": 32, "num_layers": 1})["num_layers"] == 1


def test_an_architecture_that_cannot_be_shrunk_is_named():
    with pytest.raises(UserError, match="reformer") as caught:
        tiny_config("reformer", {})
    assert "bart" in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "tokenizer"),
    [
        ([], "google-t5/t5-small"),
        (["model.from_scratch=true"], "bytes"),
        (["model.tiny=true"], "bytes"),
        (["model.from_scratch=true", "model.tokenizer=train"], "train"),
        (["model.tokenizer=my/folder"], "my/folder"),
        (["model.backbone=google/mt5-small"], "google/mt5-small"),
        (["model.backbone=demo"], "bytes"),
    ],
)
def test_which_tokenizer_a_run_uses(overrides, tokenizer):
    assert tokenizer_of(load_recipe("t5_small", overrides).model) == tokenizer


def test_a_hub_id_has_no_card_and_a_wrong_card_name_is_an_error():
    assert card_of(load_recipe("t5_small", ["model.backbone=google/mt5-small"]).model) is None
    with pytest.raises(UserError, match=r"model\.backbone=t5-small") as caught:
        card_of(load_recipe("t5_small", ["model.backbone=t5-small"]).model)
    assert " t5_small?" in caught.value.hint
    with pytest.raises(UserError, match="'t5smal'") as caught:
        load_model_yaml("t5smal")
    assert " t5_small?" in caught.value.hint
