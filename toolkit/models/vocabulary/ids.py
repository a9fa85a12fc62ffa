"""Ids of tokens in a backbone's configuration and settings of the search, for a trimmed vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from toolkit.errors import UserError
from toolkit.models.vocabulary.trimming import KEY

ID_LISTS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
_INDISPENSABLE = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def ids_of(settings: PreTrainedConfig | GenerationConfig) -> Iterator[int]:
    """Tokens that a configuration names, but for those that must not be written."""
    for key in _id_keys(settings):
        value = getattr(settings, key)
        yield from value if isinstance(value, list) else [value]


def _id_keys(settings: PreTrainedConfig | GenerationConfig) -> list[str]:
    return [key for key in settings.to_dict() if key.endswith("_token_id") and getattr(settings, key, None) is not None]


def renumber(settings: PreTrainedConfig | GenerationConfig, new_ids: Mapping[int, int]) -> None:
    """Set, in place, the ids of a configuration to those of a trimmed vocabulary; tokens without one are left out.

    Raises:
        UserError: texts cannot begin or end without one of these.
    """
    for key in _id_keys(settings):
        value = getattr(settings, key)
        if isinstance(value, list):
            setattr(settings, key, [new_ids[place] for place in value if place in new_ids] or None)
            continue
        if value not in new_ids and key in _INDISPENSABLE and isinstance(settings, PreTrainedConfig):
            raise UserError(
                f"{KEY}: the backbone's {key}={value} is no token of its tokenizer", "set model.vocabulary=full"
            )
        setattr(settings, key, new_ids.get(value))
    for key in ID_LISTS:
        if value := getattr(settings, key, None):
            setattr(settings, key, renumbered(value, new_ids))


def renumbered(ids: list[Any], new_ids: Mapping[int, int]) -> list[Any] | None:
    """Tokens that must not be written, or sequences of them; one that cannot be written any more is left out."""
    lists = [each if isinstance(each, list) else [each] for each in ids]
    found = [[new_ids[place] for place in each] for each in lists if all(place in new_ids for place in each)]
    if ids and not isinstance(ids[0], list):
        return [place for each in found for place in each] or None
    return found or None
