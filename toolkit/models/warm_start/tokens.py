"""Rows of token tables by token: what a row of the run's tokenizer is in the source's."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.models.warm_start.mapping import Axis

# Tokens that every tokenizer may call by another name.
ROLES = ("pad_token", "eos_token", "bos_token", "unk_token")


def token_ids(wanted: Any, known: Any) -> dict[int, int]:
    """The source's id of each token of the run that its tokenizer has, by the run's id; by text, else by role."""
    vocabulary = known.get_vocab()
    ids = {place: vocabulary[token] for token, place in wanted.get_vocab().items() if token in vocabulary}
    for role in ROLES:
        token, other = getattr(wanted, role, None), getattr(known, role, None)
        if token is not None and other is not None and token not in vocabulary:
            ids.setdefault(wanted.convert_tokens_to_ids(token), known.convert_tokens_to_ids(other))
    return ids


def row_axis(wanted: Any, known: Any, rows: int, source_rows: int) -> Axis:
    """The rows of a token table; those that stand for no token (tables are often padded) keep their places."""
    ids = token_ids(wanted, known)
    tokens, source_tokens = set(wanted.get_vocab().values()), set(known.get_vocab().values())
    places = torch.full((rows,), -1, dtype=torch.int64)
    for row in range(rows):
        place = ids.get(row, -1)
        if row not in tokens and row not in source_tokens:
            place = row
        if place < source_rows:
            places[row] = place
    return Axis(places, source_rows)
