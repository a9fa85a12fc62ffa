"""Who goes to train, dev and test: by source video, so that no scene, signer's outfit or sentence series leaks.

Also measures what leaks nevertheless, because a table that brings its own splits may well share texts between them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import xxhash

from toolkit.corpus.table import Row
from toolkit.errors import UserError

# The three ways in which iSign names a clip of a video. Splitting at the last dash would part the dictionary clips
# (word, definition, examples) of one video from each other.
_VIDEO_OF_UID = (
    re.compile(r"(?P<video>[0-9a-f]{12})-\d+"),
    re.compile(r"(?P<video>[A-Za-z0-9_-]{11})--\d+"),
    re.compile(r"(?P<video>[A-Za-z0-9_-]{11})_(?:w|d|e\d+)"),
)


LEAST_WORDS_OF_NEAR_TEXTS = 4


def source_video(row: Row) -> str:
    """The video that a clip was cut from: the table's word, else what an iSign uid tells, else the clip itself."""
    if row.video:
        return row.video
    for grammar in _VIDEO_OF_UID:
        if match := grammar.fullmatch(row.uid):
            return match["video"]
    return row.uid


def assign_splits(
    rows: Sequence[Row], dev_share: float, test_share: float, seed: int, table: str = "the table"
) -> dict[str, list[Row]]:
    """Deal rows out to splits: as the table says, or by source video in an order that only the seed decides.

    Whole videos go to dev until it holds its share of the clips, then to test, and the rest to train; a video's place
    does not depend on the order of the table. Every row comes to be in exactly one split.

    Args:
        rows: those that are to be clips.
        dev_share, test_share: of the clips, where the table names no splits.
        seed: decides which videos.
        table: for messages.

    Raises:
        UserError: some rows name their split and others do not, or there are too few videos to split.
    """
    named = sum(bool(row.split) for row in rows)
    if named:
        if named < len(rows):
            line = next(row.line for row in rows if not row.split)
            raise UserError(
                f"{table}, line {line} names no split while others do ({len(rows) - named} such rows): "
                "fill its split column in every row, or in none"
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
            f"{table}: all {len(rows)} clips come from {len(order)} source videos, too few to split by video: "
            "give the table a `split` column, or set data.dev_share=0 data.test_share=0"
        )
    split_of: dict[str, str] = {}
    position = 0
    for split, share in wanted.items():
        clips = 0
        # One video is always left over for what comes after.
        while position < len(order) - 1 and clips < share * len(rows):
            split_of[order[position]] = split
            clips += videos[order[position]]
            position += 1
    dealt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        dealt[split_of.get(source_video(row), "train")].append(row)
    return _in_usual_order(dealt)


def _in_usual_order(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    usual = [name for name in ("train", "dev", "test") if name in splits]
    return {name: splits[name] for name in [*usual, *sorted(set(splits) - set(usual))]}


class _LettersOnly(dict[int, int]):
    """A table for ``str.translate`` that learns characters as it meets them: letters, marks and digits stay."""

    def __missing__(self, character: int) -> int:
        stays = unicodedata.category(chr(character))[0] in "LMN"
        self[character] = character if stays else ord(" ")
        return self[character]


_LETTERS_ONLY = _LettersOnly()


def normalised_text(text: str) -> str:
    """What remains of a text when case, punctuation and spacing are taken away: the measure of sameness."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS_ONLY).split())


def _near_keys(normalised: str) -> set[int]:
    """Keys of which two normalised texts share one if they hold the same words, in any order, but for one word.

    Shorter texts have no such keys: one word less is another sentence.
    """
    words = sorted(normalised.split())
    if len(words) < LEAST_WORDS_OF_NEAR_TEXTS:
        return set()
    return {hash(tuple(words)), *(hash((*words[:i], *words[i + 1 :])) for i in range(len(words)))}


def remove_shared_texts(
    splits: dict[str, list[Row]], policy: Literal["keep", "remove", "remove_near"]
) -> tuple[dict[str, list[Row]], list[tuple[int, str, str]]]:
    """Take out of the held-out splits what train has, too: a score there should tell of translating, not of memory.

    Args:
        splits: rows by split.
        policy: ``remove`` takes clips whose text train has (apart from case and punctuation), ``remove_near`` also
            those with nearly such a text (the same words but for one).

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
                f"data.shared_texts={policy} leaves no clip in the split '{name}': train has the texts of all "
                f"{len(rows)}; split the table otherwise, or keep them"
            )
    return kept, sorted(removed)


class _SharedTexts:
    """Tells whether the training split has a text, or nearly."""

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

    Counted are clips whose text train has, too (apart from case and punctuation); clips with nearly such a text (the
    same words but for one); and clips whose source video train has.
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
