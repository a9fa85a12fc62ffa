"""Assign clips to train, dev and test by source video or by signer, and measure what splits share.

All clips of a video go to one split, so that no scene, clothes or series of sentences leak; or all clips of a signer,
so that scores hold for people whom the model has never seen. Splits that the table names may share texts, videos and
signers: that is counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import regex
import xxhash

from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.recipe.corpora import SplitBy

# The three forms of iSign's uids. Splitting at the last dash would separate the dictionary clips (word, definition,
# examples) of one video from each other.
_VIDEO_OF_UID = (
    re.compile(r"(?P<video>[0-9a-f]{12})-\d+"),
    re.compile(r"(?P<video>[A-Za-z0-9_-]{11})--\d+"),
    re.compile(r"(?P<video>[A-Za-z0-9_-]{11})_(?:w|d|e\d+)"),
)
_BETWEEN_WORDS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # all but letters, marks and digits
LEAST_WORDS_OF_NEAR_TEXTS = 4
SHARED = ("texts", "near_texts", "videos", "signers")
"""What clips of two splits may share: ``leakage`` counts ``SPLIT_KIND_in_train``."""


def source_video(row: Row) -> str:
    """The source video of a clip: the column ``video``, else the part of an iSign uid, else the uid itself."""
    if row.video:
        return row.video
    for grammar in _VIDEO_OF_UID:
        if match := grammar.fullmatch(row.uid):
            return match["video"]
    return row.uid


def assign_splits(
    rows: Sequence[Row],
    dev_share: float,
    test_share: float,
    seed: int,
    table: str = "the table",
    by: SplitBy = "table",
) -> dict[str, list[Row]]:
    """Assign rows to splits: as the table says, or by source video in an order that depends on the seed alone.

    Whole videos go to dev until it has its share of the clips, then to test, and the rest to train; the order of the
    table does not matter. Every row is in exactly one split.

    Args:
        rows: all of them.
        dev_share, test_share: of the clips; used if the table names no splits.
        seed: of the order of the videos.
        table: its name, for messages.
        by: ``video`` or ``signer`` assigns whole videos, or all clips of a signer, whatever the table says.

    Raises:
        UserError: some rows name their split, or signer, and others do not, or there are too few videos to split.
    """
    named = sum(bool(row.split) for row in rows)
    if named and by == "table":
        if named < len(rows):
            first = next(row for row in rows if not row.split)
            raise UserError(
                f"{table}, {first.place} names no split while others do ({len(rows) - named} such rows)",
                "fill the column split in every row, or in none",
            )
        given: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            given[row.split].append(row)
        return _in_usual_order(given)
    if by == "signer" and (unknown := [row for row in rows if not row.signer]):
        raise UserError(
            f"{table}, {unknown[0].place} names no signer ({len(unknown)} such rows), as data.split_by=signer needs",
            "fill the column signer in every row, map it (--columns signer=NAME), or set data.split_by=video",
        )

    kept_together, what = (_signer, "signers") if by == "signer" else (source_video, "source videos")
    by_what = "signer" if by == "signer" else "video"
    groups = Counter(map(kept_together, rows))
    order = sorted(groups, key=lambda group: xxhash.xxh3_64_digest(f"{seed}/{group}".encode()))
    wanted = {"dev": dev_share, "test": test_share}
    if len(order) < 1 + sum(share > 0 for share in wanted.values()):
        raise UserError(
            f"{table}: all {len(rows)} clips come from {len(order)} {what}, too few to split by {by_what}",
            "add a column split to the table, or set data.dev_share=0 data.test_share=0 (--dev-share 0 --test-share 0)",
        )
    split_of: dict[str, str] = {}
    position = 0
    for split, share in wanted.items():
        clips = 0
        # At least one is left for the next split.
        while position < len(order) - 1 and clips < share * len(rows):
            split_of[order[position]] = split
            clips += groups[order[position]]
            position += 1
    assigned: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        assigned[split_of.get(kept_together(row), "train")].append(row)
    return _in_usual_order(assigned)


def _signer(row: Row) -> str:
    return row.signer


def _in_usual_order(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    usual = [name for name in ("train", "dev", "test") if name in splits]
    return {name: splits[name] for name in [*usual, *sorted(set(splits) - set(usual))]}


def normalised_text(text: str) -> str:
    """A text without case, punctuation and spacing; texts count as the same if this is equal."""
    return _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def near_keys(normalised: str) -> set[int]:
    """Keys of a normalised text; two texts share a key if their words are the same, in any order, except for one word.

    Texts of fewer than four words have no keys, because without a word they are another sentence.
    """
    words = sorted(normalised.split())
    if len(words) < LEAST_WORDS_OF_NEAR_TEXTS:
        return set()
    return {hash(tuple(words)), *(hash((*words[:i], *words[i + 1 :])) for i in range(len(words)))}


def remove_shared_texts(
    splits: dict[str, list[Row]], policy: Literal["keep", "remove", "remove_near"]
) -> tuple[dict[str, list[Row]], list[tuple[int, str, str]]]:
    """Remove clips from the held-out splits whose text is in train, so that scores there do not measure memory.

    Args:
        splits: rows by split.
        policy: ``remove`` removes clips whose text is in train (apart from case and punctuation), ``remove_near`` also
            those whose words are the same except for one.

    Returns:
        the splits without these clips, and line, uid and reason of each of them.

    Raises:
        UserError: a split would be left empty.
    """
    if policy == "keep":
        return splits, []
    shared = _SharedTexts(splits.get("train", []))
    kept: dict[str, list[Row]] = {}
    removed: list[tuple[int, str, str]] = []
    for name, rows in splits.items():
        kept[name] = []
        for row in rows:
            verdict = shared.verdict(row.text) if name != "train" else None
            if verdict is None or (verdict == "near" and policy == "remove"):
                kept[name].append(row)
            else:
                removed.append((row.line, row.uid, f"train has {'' if verdict == 'same' else 'nearly '}its text"))
        if rows and not kept[name]:
            raise UserError(
                f"data.shared_texts={policy} leaves no clip in the split '{name}': all {len(rows)} texts are in train",
                "split the table in another way, or set data.shared_texts=keep (--shared-texts keep)",
            )
    return kept, sorted(removed)


class _SharedTexts:
    """Looks up whether the training split has the same or nearly the same text."""

    def __init__(self, train: Sequence[Row]) -> None:
        self._texts = {normalised_text(row.text) for row in train}
        self._near = {key for text in self._texts for key in near_keys(text)}

    def verdict(self, text: str) -> Literal["same", "near"] | None:
        normalised = normalised_text(text)
        if normalised in self._texts:
            return "same"
        return None if self._near.isdisjoint(near_keys(normalised)) else "near"


def leakage(splits: dict[str, list[Row]]) -> dict[str, int]:
    """How much each held-out split shares with train.

    Counted are clips whose text is in train (apart from case and punctuation); clips whose words are those of a text in
    train except for one; clips whose source video is in train; and, where the table names signers, clips whose signer
    is in train.
    """
    train = splits.get("train", [])
    texts = _SharedTexts(train)
    videos = {source_video(row) for row in train}
    signers = {row.signer for row in train if row.signer}
    are_named = any(row.signer for rows in splits.values() for row in rows)
    shared = {}
    for name, rows in splits.items():
        if name != "train":
            verdicts = Counter(texts.verdict(row.text) for row in rows)
            shared[f"{name}_texts_in_train"] = verdicts["same"]
            shared[f"{name}_near_texts_in_train"] = verdicts["near"]
            shared[f"{name}_videos_in_train"] = sum(source_video(row) in videos for row in rows)
            if are_named:
                shared[f"{name}_signers_in_train"] = sum(row.signer in signers for row in rows)
    return shared
