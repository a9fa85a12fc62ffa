"""How many tokens a recipe's model will have, where ``model.vocabulary: corpus`` trims them.

It takes the prepared corpus and the tokenizer's files. Without them a plan counts the full vocabulary, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from toolkit.corpus.mixture.opening import open_prepared
from toolkit.errors import UserError
from toolkit.models.vocabulary.needed import full_tokenizer, trimmed_tokenizer
from toolkit.models.vocabulary.trimming import trimming_of
from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class PlannedVocabulary:
    """The tokens that a plan counts.

    Attributes:
        rows: of the token tables; None where the backbone's own are counted.
        what: the same in words; empty where nothing is trimmed.
    """

    rows: int | None = None
    what: str = ""


def planned_vocabulary(recipe: Recipe) -> PlannedVocabulary:
    """What a plan counts; tokenises the training texts once, and downloads nothing.

    Raises:
        UserError: the vocabulary cannot be trimmed as the recipe asks.
    """
    if recipe.model.vocabulary == "full":
        return PlannedVocabulary()
    # What does not change the tokenizer is left out, so that plans with other adapters find it again.
    model = recipe.model.model_copy(update={"lora": None, "quantization": None, "freeze": []})
    return _counted(recipe.model_copy(update={"model": model}).model_dump_json())


@lru_cache(maxsize=8)
def _counted(recipe_json: str) -> PlannedVocabulary:
    recipe = Recipe.model_validate_json(recipe_json)
    try:
        corpus = open_prepared(recipe.data)
        if corpus is None:
            return _full("data.corpus names no prepared corpus")
        tokenizer = full_tokenizer(recipe, local_only=True)
    except UserError as error:
        return _full(error.message)
    if "train" not in corpus.splits:
        return _full(f"{corpus.path} has no training split")
    trimming = trimming_of(trimmed_tokenizer(tokenizer, recipe, corpus))
    assert trimming
    return PlannedVocabulary(len(trimming.kept) + len(recipe.model.extra_tokens), f"{trimming.in_words()} are kept")


def _full(reason: str) -> PlannedVocabulary:
    return PlannedVocabulary(None, f"counted in full, though it will be trimmed: {reason}")
