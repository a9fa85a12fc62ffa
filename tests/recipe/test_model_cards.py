"""Model cards: published dimensions that give the published size, tokenizers, and the shrunken configuration."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from toolkit.errors import UserError
from toolkit.models.sizes import count_parameters
from toolkit.recipe.load import load_recipe
from toolkit.recipe.model_cards import TINY_LIMITS, card_of, load_model_yaml, model_names, tiny_config, tokenizer_of


@pytest.mark.parametrize("name", model_names())
def test_the_dimensions_give_the_parameters_that_the_card_states(name):
    card = load_model_yaml(name)
    assert card.name == name
    assert count_parameters(card) == card.parameters, f"recipes/models/{name}.yaml should say {count_parameters(card)}"


@pytest.mark.parametrize("name", model_names())
def test_every_dimension_is_one_that_transformers_knows(name):
    card = load_model_yaml(name)
    known = set(AutoConfig.for_model(card.architecture).to_dict())
    assert set(card.config) <= known | {"decoder_start_token_id"}  # a generation setting, kept when given


def test_t5_small_has_its_published_size():
    assert load_model_yaml("t5_small").parameters == 60_506_624


@pytest.mark.parametrize("architecture", sorted(TINY_LIMITS))
def test_a_tiny_configuration_is_small_and_of_the_same_architecture(architecture):
    published = load_model_yaml("t5_small").config
    before = dict(published)
    tiny = tiny_config(architecture, published)
    assert published == before
    assert (tiny["num_layers"], tiny["num_decoder_layers"]) == (2, 2)
    assert {key: value for key, value in tiny.items() if key not in TINY_LIMITS[architecture]} == {
        key: value for key, value in published.items() if key not in TINY_LIMITS[architecture]
    }
    model = T5ForConditionalGeneration(T5Config(**{**tiny, "vocab_size": 384}))
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


def test_shrinking_never_enlarges():
    assert tiny_config("t5", {"d_model": 32, "num_layers": 1})["d_model"] == 32
    assert tiny_config("t5", {"d_model": 32, "num_layers": 1})["num_layers"] == 1


def test_an_architecture_that_cannot_be_shrunk_is_named():
    with pytest.raises(UserError, match="how a reformer shrinks; known: t5"):
        tiny_config("reformer", {})


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
    with pytest.raises(UserError, match=r"model\.backbone=t5-small: no such model card; did you mean t5_small"):
        card_of(load_recipe("t5_small", ["model.backbone=t5-small"]).model)
    with pytest.raises(UserError, match="did you mean t5_small"):
        load_model_yaml("t5smal")
