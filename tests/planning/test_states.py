"""Model states of the shipped recipes: what trains, what their comments say, and that one 24 GiB card holds them."""

from __future__ import annotations

import re

import pytest

from toolkit.models.backbone_config import backbone_config
from toolkit.models.language_models.prompts import words_around_poses
from toolkit.models.tokenizers import make_tokenizer
from toolkit.planning.candidates import STATES_SHARE
from toolkit.planning.costs.counts import CHAT, count, empty_translator
from toolkit.planning.costs.zero import zero_memory
from toolkit.planning.hardware import GIB
from toolkit.planning.overview import overview
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.load import load_recipe, recipe_names
from toolkit.recipe.model_cards import load_model_yaml
from toolkit.recipe.paths import recipes_dir


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_fits_the_card_that_it_names_and_says_how(name: str) -> None:
    recipe = load_recipe(name)
    counts = count(recipe)
    assert counts.backbone == load_model_yaml(recipe.model.backbone).parameters
    assert sum(weight.numel for weight in counts.weights) >= counts.backbone + counts.pose_encoder
    states = zero_memory(counts.weights, recipe, load_deepspeed(recipe.deepspeed, recipe.ds), world_size=1)
    assert states.device <= 24 * GIB * STATES_SHARE
    if name == "demo":
        return  # trains on a CPU
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    said = re.search(
        r"# One 24 GiB card: ([\d.]+) GiB of model states(?: and ([\d.]+) GiB of host memory)?, estim", text
    )
    assert said, "the recipe says what it takes"
    assert float(said[1]) == pytest.approx(states.device / GIB, abs=0.06)
    assert float(said[2] or 0) == pytest.approx(states.host / GIB, abs=0.06)
    assert "# 8 x 80 GiB: " in text
    assert f"launch/train.py --recipe {name} " in text


def test_adapters_train_a_few_numbers() -> None:
    # 24 + 24 × 2 attentions of T5-3B, queries and values of each, rank 16 from 1,024 to 32 heads × 128.
    assert overview(load_recipe("t5_3b_lora")).trainable == 72 * 2 * 16 * (1024 + 4096)
    assert overview(load_recipe("transformer")).trainable == 31_133_184 - 384 * 512 - (512 * 512 + 512)


@pytest.mark.parametrize(
    ("recipe", "given", "tokens"),
    [
        ("t5_small", "model.prefix='{language}:'", 64),
        ("t5_small", "model.prefix='translate:'", 10),
        ("t5_small", "model.prefix=null", 0),
        ("qwen2_5_0_5b", "model.prompt='Translate {poses} into English:'", 9 + 14),
        ("qwen2_5_0_5b", "model.prompt='From {language} {poses} into English:'", 64 + 13),
    ],
)
def test_words_beside_the_poses_count_with_all_of_their_tokens(recipe: str, given: str, tokens: int) -> None:
    """In bytes, the last of which begins the text of a language model; a clip's own words are the most they may be."""
    asked = load_recipe(recipe, ["model.from_scratch=true", given])
    model = asked.model
    planned = empty_translator(backbone_config(model), asked).config.longest_prefix
    assert planned == tokens
    if "{language}" not in given and model.prompt:
        words = words_around_poses(model, make_tokenizer("bytes"))
        assert 0 <= planned - len(words.before) - len(words.behind) <= 3, "but for spaces, and what begins the text"


def test_words_of_a_published_vocabulary_are_estimated_with_the_chat_around_them() -> None:
    prompt = "Translate Indian Sign Language into English:"
    counted = {}
    for given in (f"prefix='{prompt}'", f"prompt='{prompt} {{poses}}'"):
        recipe = load_recipe("qwen2_5_0_5b", ["model.prompt=null", f"model.{given}"])
        config = backbone_config(recipe.model.model_copy(update={"from_scratch": True}))
        counted[given.partition("=")[0]] = empty_translator(config, recipe).config.longest_prefix
    assert counted == {"prefix": len(prompt) / 4, "prompt": len(prompt) / 4 + CHAT}
