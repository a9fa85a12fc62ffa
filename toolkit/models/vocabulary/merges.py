"""The merges of byte-pair encoding (Sennrich et al. 2016) by which a subword comes about.

A text's subwords have boundaries that no merge has crossed. So a subword is merged in any text as it is alone, and the
merges of the subwords that texts consist of are all that these texts need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

Pair = tuple[str, str]
Rank = Callable[[Pair], float | None]  # of a pair of neighbours, None where they never merge; the lowest merges first


def merges_of(subwords: Iterable[str], rank: Rank) -> list[Pair]:
    """All merges that these subwords need, each once."""
    found: dict[Pair, None] = {}
    for subword in subwords:
        found |= dict.fromkeys(_derivation(subword, rank))
    return list(found)


def _derivation(subword: str, rank: Rank) -> list[Pair]:
    """The merges that are made in the characters of a subword, in their order."""
    symbols, made = list(subword), []
    while len(symbols) > 1:
        ranks = [rank(pair) for pair in pairwise(symbols)]
        candidates = [(one, place) for place, one in enumerate(ranks) if one is not None]
        if not candidates:
            break
        place = min(candidates)[1]
        pair = (symbols[place], symbols[place + 1])
        made.append(pair)
        symbols[place : place + 2] = ["".join(pair)]
    return made
