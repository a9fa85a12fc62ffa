"""Conditions of clips: what a model wants to know of a clip besides its poses, and whether a corpus knows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from toolkit.batching.languages import language_id
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.language_models.prompts import words_around_poses
from toolkit.models.tokenizers import make_tokenizer, text_frame
from toolkit.models.vocabulary.needed import full_tokenizer
from toolkit.recipe.model_cards import language_of, tokenizer_of
from toolkit.recipe.prompts import fill, own_words, placeholders
from toolkit.recipe.schema import Recipe

LANGUAGES_COLUMN = "the column target_language"


def check_recipe_conditions(recipe: Recipe, corpus: Corpus) -> None:
    """See that the training clips have what the recipe's prefix names, and languages that its tokenizer knows; and
    that a chat template keeps the poses of a prompt.

    Raises:
        UserError: they do not, or it does not.
    """
    if recipe.model.prompt and tokenizer_of(recipe.model) != "train":
        words_around_poses(recipe.model, full_tokenizer(recipe))
    language = language_of(recipe)
    tokenizer = None
    if language and any(known["target_language"] for known, _ in corpus.splits["train"].condition_counts()):
        trust = recipe.model.trust_remote_code
        tokenizer = make_tokenizer(tokenizer_of(recipe.model), language=language, trust_remote_code=trust)
    check_conditions(placeholders(own_words(recipe.model.prefix, recipe.model.prompt)), corpus, ["train"], tokenizer)


def check_conditions(names: Sequence[str], corpus: Corpus, splits: Iterable[str], tokenizer: Any = None) -> None:
    """See that the clips of these splits have the conditions ``names``, and languages that the tokenizer knows.

    Raises:
        UserError: no clip of a split has one of them; the tokenizer does not know a target language, or writes it
            where each text cannot have its own.
    """
    for split in splits:
        counts = _counts(corpus, split)
        for name in names:
            if not counts[name]:
                raise UserError(
                    f"the prefix of the model names {{{name}}}, and no clip of split {split} in {corpus.path} has one",
                    f"add a column {name} to the table (or map one: data.columns.{name}=NAME) and prepare the corpus "
                    "again, or change model.prefix",
                )
        for language in counts["target_language"]:
            if getattr(tokenizer, "tgt_lang", None):
                _check_language(tokenizer, language)


def _check_language(tokenizer: Any, language: str) -> None:
    language_id(tokenizer, language, LANGUAGES_COLUMN)
    if language.strip("_") != tokenizer.tgt_lang and not text_frame(tokenizer)[0]:
        raise UserError(
            f"{LANGUAGES_COLUMN} has {language!r}, and this tokenizer writes every text in {tokenizer.tgt_lang}",
            "train on texts of one language, or with mbart50, m2m100 or nllb_600m, whose texts begin with theirs",
        )


def _counts(corpus: Corpus, split: str) -> dict[str, Counter[str]]:
    """How many clips of a split have which value of each condition; those without one do not count."""
    counts: dict[str, Counter[str]] = {}
    for known, clips in corpus.splits[split].condition_counts():
        for name, value in known.items():
            counts.setdefault(name, Counter()).update({value: clips} if value else {})
    return counts


def condition_notes(recipe: Recipe, corpus: Corpus, tokenizer: Any) -> Iterator[str]:
    """What a user should know of the conditions of the training clips: which are missing, unused or truncated."""
    model, split = recipe.model, corpus.splits["train"]
    words, counts = own_words(model.prefix, model.prompt), _counts(corpus, "train")
    named = placeholders(words)
    for name in named:
        if missing := len(split) - counts[name].total():
            yield f"{missing} of {len(split)} training clips have no {name}, and their prefix leaves it out"
    languages = counts["target_language"]
    if len(languages) > 1 and "target_language" not in named and not getattr(tokenizer, "tgt_lang", None):
        yield (
            f"the training texts have {len(languages)} values of target_language, and nothing says which to the model; "
            "model.prefix='{target_language}:' does"
        )
    limit = model.max_prefix_tokens
    if named:
        # A tokenizer makes at most two tokens of a byte, so short prefixes need not be tokenised.
        prefixes: Counter[str] = Counter()
        for known, clips in split.condition_counts():
            prefixes[fill(words, known)] += clips
        suspects = [prefix for prefix in prefixes if 2 * len(prefix.encode()) > limit]
        ids = tokenizer(suspects, add_special_tokens=False)["input_ids"] if suspects else []
        lengths = {prefix: len(of_prefix) for prefix, of_prefix in zip(suspects, ids, strict=True)}
        truncated = sum(prefixes[prefix] for prefix, length in lengths.items() if length > limit)
        if truncated:
            yield (
                f"the prefixes of {truncated} of {len(split)} training clips have more than "
                f"model.max_prefix_tokens={limit} tokens and are truncated, the longest has {max(lengths.values())}"
            )
