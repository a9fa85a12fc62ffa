"""The token with which a multilingual backbone (mBART-50, M2M100, NLLB) begins a text: the code of its language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.errors import UserError


def language_id(tokenizer: Any, code: str, where: str = "evaluation.forced_language") -> int:
    """The token with which a multilingual backbone begins a text in this language.

    ``code`` is as the tokenizer writes it: ``hi_IN`` (mBART), ``hin_Deva`` (NLLB), ``hi`` or ``__hi__`` (M2M100);
    ``where`` names the setting or the column that it stands in.

    Raises:
        UserError: the tokenizer does not know it.
    """
    codes = languages_of(tokenizer)
    if code.strip("_") in codes:
        return int(tokenizer.convert_tokens_to_ids(codes[code.strip("_")]))
    few = ", ".join(list(codes)[:12])
    raise UserError(
        f"{where}: the tokenizer has no language {code!r}",
        f"set it to a language such as {few}" if codes else f"drop {where}: this tokenizer has no languages",
    )


def language_tokens(tokenizer: Any, languages: Sequence[str]) -> list[int] | None:
    """The token that the text of each clip begins with; an empty language is the tokenizer's own.

    None where texts begin with no language, or all are in the tokenizer's own.

    Raises:
        UserError: the tokenizer does not know a language.
    """
    own = getattr(tokenizer, "tgt_lang", None)
    if own is None or not any(language and language.strip("_") != own for language in languages):
        return None
    tokens = {language: language_id(tokenizer, language or own) for language in dict.fromkeys(languages)}
    return [tokens[language] for language in languages]


def languages_of(tokenizer: Any) -> dict[str, str]:
    """The token of each language by its code, sorted; mostly they are the same."""
    codes = getattr(tokenizer, "lang_code_to_token", None)
    if codes is None:
        # T5's and ByT5's <extra_id_0> are no languages.
        codes = {token: token for token in tokenizer.get_added_vocab() if "_" in token and token[0] != "<"}
    return dict(sorted(codes.items()))
