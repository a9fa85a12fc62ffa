"""What held-out clips share with the training clips of the same run, within each corpus and between those of a mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from toolkit.corpus.mixture.split import Share
from toolkit.corpus.packed import Corpus
from toolkit.corpus.splits import SHARED, near_keys, normalised_text

BETWEEN = "_of_another_corpus"
Found = dict[str, set[Any]]
"""Of each kind the values of some clips."""


def shared_data(corpus: Corpus) -> dict[str, int]:
    """How many clips of each held-out split share a text, a video or a signer with train, by what they share.

    What a corpus shares with itself was counted when it was prepared. Between the corpora of a mix it is counted here,
    out of all their texts: about twenty seconds for a million clips.
    """
    return corpus.metadata.leakage | (leakage_between(corpus.splits) if corpus.members else {})


def leakage_notes(corpus: Corpus) -> list[str]:
    """A line for each kind of data that splits share."""
    return [
        f"splits of the corpus share data: {name.replace('_', ' ')} {count:,}"
        for name, count in shared_data(corpus).items()
        if count
    ]


def leakage_between(splits: Mapping[str, Any]) -> dict[str, int]:
    """How many clips of each held-out split of a mix share something with the training clips of another corpus.

    Args:
        splits: of a mix, by name.

    Returns:
        counts as of :func:`toolkit.corpus.splits.leakage`, under their names and ``_of_another_corpus``. Videos and
        signers are compared by name. Signers are counted where a clip of the split names one.
    """
    train = splits["train"].shares if "train" in splits else []
    held_out = {name: split.shares for name, split in splits.items() if name != "train"}
    wanted = _union(map(_values, (share for shares in held_out.values() for share in shares)))
    # Of train only what held-out clips have, too, is kept: it may be a hundred times as large.
    in_train = {share.settings.label: _values(share, wanted) for share in train}
    counts: dict[str, int] = {}
    for name, shares in held_out.items():
        shared: Counter[str] = Counter(texts=0, near_texts=0, videos=0)
        for share in shares:
            others = _union(found for label, found in in_train.items() if label != share.settings.label)
            shared.update(_shared_kinds(share, others))
        counts |= {f"{name}_{kind}_in_train{BETWEEN}": count for kind, count in shared.items()}
    return counts


def _values(share: Share, wanted: Found | None = None) -> Found:
    """The texts, keys of near texts, videos and signers of a corpus; only those that are wanted, if any are given."""
    texts = {normalised_text(text) for text in share.split.texts}
    found: Found = {
        "texts": texts,
        "videos": {*share.split.values("video")} - {""},
        "signers": {*share.split.values("signer")} - {""},
        "near_texts": set(),
    }
    for text in texts:
        keys = near_keys(text)
        found["near_texts"] |= keys if wanted is None else keys & wanted["near_texts"]
    return found if wanted is None else {kind: values & wanted[kind] for kind, values in found.items()}


def _union(found: Iterable[Found]) -> Found:
    total: Found = {kind: set() for kind in SHARED}
    for one in found:
        for kind, values in one.items():
            total[kind] |= values
    return total


def _shared_kinds(share: Share, others: Found) -> Counter[str]:
    """How many clips of a corpus have what other corpora have in train."""
    shared: Counter[str] = Counter()
    for text in map(normalised_text, share.split.texts):
        if text in others["texts"]:
            shared["texts"] += 1
        elif not others["near_texts"].isdisjoint(near_keys(text)):
            shared["near_texts"] += 1
    shared["videos"] = sum(video in others["videos"] for video in share.split.values("video"))
    signers = [*share.split.values("signer")]
    if any(signers):
        shared["signers"] = sum(signer in others["signers"] for signer in signers)
    return shared
