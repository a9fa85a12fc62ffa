"""Assign clips to train, dev and test by source video, and measure what splits share.

All clips of a video go to one split, so that no scene, clothes or series of sentences leak. Splits that the table names
may share texts and videos: that is counted.
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

# The three forms of iSign's uids. Splitting at the last dash would separate the dictionary clips (word, definition,
# examples) of one video from each other.
_VIDEO_OF_UID = (
    re.compile(r"(?P<video>[0-9a-f]{12})-\d+"),
    re.compile(r"(?P<video>[A-Za-z0-9_-]{11})--\d+"),
    re.compile(r"(?P<video>[A-Za-z0-9_-]{11})_(?:w|d|e\d+)"),
)
_BETWEEN_WORDS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # all but letters, marks and digits
LEAST_WORDS_OF_NEAR_TEXTS = 4


def source_video(row: Row) -> str:
    """The source video of a clip: the column ``video``, else the part of an iSign uid, else the uid itself."""
    if row.video:
        return row.video
    for grammar in _VIDEO_OF_UID:
        if match := grammar.fullmatch(row.uid):
            return match["video"]
    return row.uid


def assign_splits(
    rows: Sequence[Row], dev_share: float, test_share: float, seed: int, table: str = "the table"
) -> dict[str, list[Row]]:
    """Assign rows to splits: as the table says, or by source video in an order that depends on the seed alone.

    Whole videos go to dev until it has its share of the clips, then to test, and the rest to train; the order of the
    table does not matter. Every row is in exactly one split.

    The shares, of the clips, are used if the table names no splits; ``seed`` is of the order of the videos.

    Raises:
        UserError: some rows name their split and others do not, or there are too few videos to split.
    """
    named = sum(bool(row.split) for row in rows)
    if named:
        if named < len(rows):
            line = next(row.line for row in rows if not row.split)
            raise UserError(
                f"{table}, line {line} names no split while others do ({len(rows) - named} such rows)",
                "fill the column split in every row, or in none",
            )
        given: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            given[row.split].append(row)
        return _in_usual_order(given)

    videos = Counter(source_video(row) for row in rows)
    order = sorted(videos, key=lambda video: xxhash.xxh3_64_digest(f"{seed}/{video}".encode()))
    wanted = {"dev": dev_share, "test": test_share}
    if len(order) < 1 + sum(share > 0 for share in wanted.values()):
        raise UserError(
            f"{table}: all {len(rows)} clips come from {len(order)} source videos, too few to split by video",
            "add a column split to the table, or set data.dev_share=0 data.test_share=0 (--dev-share 0 --test-share 0)",
        )
    split_of: dict[str, str] = {}
    position = 0
    for split, share in wanted.items():
        clips = 0
        # At least one video is left for the next split.
        while position < len(order) - 1 and clips < share * len(rows):
            split_of[order[position]] = split
            clips += videos[order[position]]
            position += 1
    assigned: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        assigned[split_of.get(source_video(row), "train")].append(row)
    return _in_usual_order(assigned)


def _in_usual_order(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    usual = [name for name in ("train", "dev", "test") if name in splits]
    return {name: splits[name] for name in [*usual, *sorted(set(splits) - set(usual))]}


def normalised_text(text: str) -> str:
    """A text without case, punctuation and spacing; texts count as the same if this is equal."""
    return _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _near_keys(normalised: str) -> set[int]:
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
        self._near = {key for text in self._texts for key in _near_keys(text)}

    def verdict(self, text: str) -> Literal["same", "near"] | None:
        normalised = normalised_text(text)
        if normalised in self._texts:
            return "same"
        return None if self._near.isdisjoint(_near_keys(normalised)) else "near"


def leakage(splits: dict[str, list[Row]]) -> dict[str, int]:
    """How much each held-out split shares with train.

    Counted are clips whose text is in train (apart from case and punctuation); clips whose words are those of a text in
    train except for one; and clips whose source video is in train.
    """
    train = splits.get("train", [])
    texts = _SharedTexts(train)
    videos = {source_video(row) for row in train}
    shared = {}
    for name, rows in splits.items():
        if name != "train":
            verdicts = Counter(texts.verdict(row.text) for row in rows)
            shared[f"{name}_texts_in_train"] = verdicts["same"]
            shared[f"{name}_near_texts_in_train"] = verdicts["near"]
            shared[f"{name}_videos_in_train"] = sum(source_video(row) in videos for row in rows)
    return shared
