"""Which tokens of a vocabulary a run needs: those of its training texts and prefixes, and a margin of frequent ones.

Held-out texts do not decide: they are scored as texts, and what they have that training texts lack is written by
shorter tokens, as any text is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError, first_line
from toolkit.models.backbone_config import is_for_language_model
from toolkit.models.language_models.prompts import words_around_poses
from toolkit.models.tokenizers import make_tokenizer
from toolkit.models.vocabulary.trimming import check_trimmable, forget_trimming, trimmed, trimming_of
from toolkit.recipe.model_cards import card_of, language_of, reads_published, tokenizer_of
from toolkit.recipe.prompts import fill, own_words
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import Model

TEXT_KEY = "model.vocabulary_text"
_AT_ONCE = 10_000  # texts that are tokenised together


def run_tokenizer(recipe: Recipe, corpus: Corpus, config_ids: Iterable[int] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a run on ``corpus``, trimmed where the recipe says so, without the recipe's extra tokens.

    Args and errors as of the two that it calls.
    """
    tokenizer = full_tokenizer(recipe, corpus)
    if recipe.model.vocabulary == "full":
        return tokenizer
    return trimmed_tokenizer(tokenizer, recipe, corpus, config_ids)


def full_tokenizer(
    recipe: Recipe, corpus: Corpus | None = None, *, local_only: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run before it is trimmed.

    Args:
        recipe: the recipe.
        corpus: for a tokenizer that is trained.
        local_only: whether to take its files from this machine alone.

    Raises:
        UserError: it cannot be loaded, or is one that was trimmed and goes with no published weights.
    """
    name = tokenizer_of(recipe.model)
    tokenizer = make_tokenizer(
        name,
        corpus.splits["train"].texts if corpus else (),
        language=language_of(recipe),
        trust_remote_code=recipe.model.trust_remote_code,
        for_language_model=_is_language_model(recipe.model),
        local_only=local_only,
    )
    if trimming_of(tokenizer) and reads_published(recipe.model):
        raise UserError(
            f"model.tokenizer={name} was trimmed: its tokens have other numbers than the rows of "
            f"model.backbone={recipe.model.backbone}",
            "name the full tokenizer, and set model.vocabulary=corpus",
        )
    return forget_trimming(tokenizer)


def trimmed_tokenizer(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, corpus: Corpus, config_ids: Iterable[int] = ()
) -> PreTrainedTokenizerBase:
    """The run's tokenizer with the tokens that its training texts and prefixes need, and its margin.

    ``config_ids`` are tokens of the backbone's configuration, which stay.

    Raises:
        UserError: it cannot be trimmed, or the text file of its margin cannot be read.
    """
    model = recipe.model
    needed = {place for place in config_ids if place < len(tokenizer)}
    for ids in _tokenized(tokenizer, corpus.splits["train"].texts):
        needed.update(ids)
    if words := own_words(model.prefix, model.prompt):
        for ids in tokenizer(list(_prefixes(words, corpus)), add_special_tokens=False)["input_ids"]:
            needed.update(ids)
    if _is_language_model(model):
        around = words_around_poses(model, tokenizer)
        needed.update(around.before, around.behind, [around.start])
    smaller, trimming = trimmed(tokenizer, needed, tokenizer_of(model))
    if model.vocabulary_text:
        needed |= _margin(tokenizer, _lines(model.vocabulary_text), model.vocabulary_margin, set(trimming.kept))
        smaller, _ = trimmed(tokenizer, needed, tokenizer_of(model))
    return smaller


def check_tokenizer(recipe: Recipe) -> None:
    """See, before a run starts, that its tokenizer can be loaded, and trimmed where the recipe asks for it.

    Raises:
        UserError: it cannot, or the text file of its margin cannot be read.
    """
    trims, name = recipe.model.vocabulary != "full", tokenizer_of(recipe.model)
    if trims and recipe.model.vocabulary_text:
        next(_lines(recipe.model.vocabulary_text))
    if trims or name != "train":  # one that is trained on the corpus exists later
        tokenizer = full_tokenizer(recipe)
        if trims:
            check_trimmable(tokenizer, name)


def _is_language_model(model: Model) -> bool:
    """Whether the run's tokenizer is one of a language model; a model card answers without the hub."""
    own = {"from_scratch": True, "tokenizer": tokenizer_of(model)} if card_of(model) else {}
    return is_for_language_model(model.model_copy(update=own))


def _prefixes(template: str, corpus: Corpus) -> dict[str, None]:
    """The words before the poses of each training clip, and those without any condition, each once."""
    conditions = [{}, *corpus.splits["train"].conditions()]
    return dict.fromkeys(fill(template, of_clip) for of_clip in conditions)


def _tokenized(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    remaining = iter(texts)
    while group := list(islice(remaining, _AT_ONCE)):
        yield from tokenizer(text_target=group)["input_ids"]


def _lines(path: str) -> Iterator[str]:
    """Lines of a text file but empty ones.

    Raises:
        UserError: it cannot be read, or there are none.
    """
    found = False
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line := line.strip():
                    found = True
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{TEXT_KEY}={path} cannot be read: {first_line(error)}", "name a text file in UTF-8, one text a line"
        ) from error
    if not found:
        raise UserError(f"{TEXT_KEY}={path} holds no text", "write one text a line, or leave the key out")


def _margin(tokenizer: Any, texts: Iterable[str], size: int, kept: set[int]) -> set[int]:
    """The most frequent tokens of some texts that are not kept already; of equally frequent ones the first."""
    counts: Counter[int] = Counter()
    for ids in _tokenized(tokenizer, texts):
        counts.update(ids)
    others = [(-count, place) for place, count in counts.items() if place not in kept]
    return {place for _, place in sorted(others)[:size]}
