"""Removes subwords from a saved tokenizer's files: ``tokenizer.json``, or ``vocab.json`` and SentencePiece models.

What is left tokenises texts of kept subwords as before. Of a unigram model (Kudo 2018) the best segmentation stays the
best among fewer, at the same scores; of byte-pair encoding the merges of kept subwords stay, in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.models.vocabulary.merges import Pair, Rank, merges_of
from toolkit.models.vocabulary.sentencepiece import NORMAL, is_bpe, read_subwords, without_others

FAST_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.json"
SPACE = "▁"  # that SentencePiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LANGUAGE = re.compile(r">>.+<<")  # Marian's


class NotTrimmable(Exception):
    """A tokenizer that cannot be trimmed; the reason, in words."""


def check_files(folder: Path) -> None:
    """Raise NotTrimmable where a saved tokenizer is of no kind that :func:`trim_files` knows."""
    if (folder / FAST_FILE).is_file():
        model = _read(folder / FAST_FILE)["model"]
        if model["type"] not in ("Unigram", "BPE"):
            raise NotTrimmable(f"it is a {model['type']} tokenizer, and only Unigram and BPE are known")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise NotTrimmable("it marks the inside or the end of words, which is not known")
    elif not (folder / VOCABULARY_FILE).is_file() or not _models(folder):
        raise NotTrimmable("it learnt no subwords from texts")
    elif (folder / "target_vocab.json").is_file():
        raise NotTrimmable("it has a vocabulary for each language")


def trim_files(folder: Path, needed: set[str]) -> None:
    """Remove subwords that are not needed, in place; a text of any characters that it could write stays one.

    Besides those that are needed there stay added and special tokens, bytes, what the kept subwords are merged from,
    and, where no byte stands in for a character, subwords of a single one.

    Raises:
        NotTrimmable: as :func:`check_files` does.
    """
    check_files(folder)
    if (folder / FAST_FILE).is_file():
        content = _read(folder / FAST_FILE)
        _trim_json(content, needed)
        _write(folder / FAST_FILE, content)
    else:
        _trim_with_models(folder, needed)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _models(folder: Path) -> list[Path]:
    """The SentencePiece models of a tokenizer."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".model", ".spm"))


def always_kept(subwords: Iterable[str], *, has_bytes: bool) -> set[str]:
    """Subwords without which some texts could not be written."""
    subwords = set(subwords)
    kept = {subword for subword in subwords if _BYTE.fullmatch(subword)} | (subwords & {SPACE})
    if has_bytes:
        return kept
    single = {subword for subword in subwords if len(subword) == 1}
    # A character may be there only at the beginning of a word.
    return (
        kept
        | single
        | {subword for subword in subwords if len(subword) == 2 and subword[0] == SPACE and subword[1] not in single}
    )


def _trim_json(content: dict[str, Any], needed: set[str]) -> None:
    model = content["model"]
    added = sorted(content["added_tokens"], key=lambda token: token["id"])
    needed = needed | {token["content"] for token in added}
    if model["type"] == "Unigram":
        _trim_unigram(model, needed)
        ids = {subword: place for place, (subword, _) in enumerate(model["vocab"])}
    else:
        ids = _trim_bpe(model, needed)
    for token in added:
        token["id"] = ids.setdefault(token["content"], len(ids))
    content["added_tokens"] = sorted(added, key=lambda token: token["id"])
    _renumber(content.get("post_processor"), ids)


def _trim_unigram(model: dict[str, Any], needed: set[str]) -> None:
    vocabulary: list[tuple[str, float]] = [(subword, score) for subword, score in model["vocab"]]
    scores = dict(vocabulary)
    unknown = vocabulary[model["unk_id"]][0] if model["unk_id"] is not None else None
    kept = needed | always_kept(scores, has_bytes=model.get("byte_fallback", False)) | {unknown}
    # An unknown character's score follows from the lowest one.
    kept.add(min(scores, key=scores.__getitem__))
    model["vocab"] = [entry for entry in vocabulary if entry[0] in kept]
    if unknown is not None:
        model["unk_id"] = [subword for subword, _ in model["vocab"]].index(unknown)


def _trim_bpe(model: dict[str, Any], needed: set[str]) -> dict[str, int]:
    """Returns the new ids of the model's subwords."""
    vocabulary: dict[str, int] = model["vocab"]
    merges: list[Pair] = [_pair(entry) for entry in model["merges"]]
    kept = needed | always_kept(vocabulary, has_bytes=model.get("byte_fallback", False))
    kept |= {model["unk_token"]} if model.get("unk_token") else set()
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    made = set(merges_of((subword for subword in kept if subword in vocabulary), ranks.get))
    kept |= {part for pair in made for part in (*pair, "".join(pair))}
    model["merges"] = [list(pair) for pair in merges if pair in made]
    ordered = sorted((subword for subword in vocabulary if subword in kept), key=vocabulary.__getitem__)
    model["vocab"] = {subword: place for place, subword in enumerate(ordered)}
    return dict(model["vocab"])


def _pair(entry: str | list[str]) -> Pair:
    """A merge, which older files write as one text."""
    first, second = entry.split(" ") if isinstance(entry, str) else entry
    return first, second


def _renumber(post_processor: Any, ids: Mapping[str, int]) -> None:
    """Set, in place, the ids of the tokens that stand around each text."""
    if not isinstance(post_processor, dict):
        return
    for inner in post_processor.get("processors", []):
        _renumber(inner, ids)
    for token in (post_processor.get("special_tokens") or {}).values():
        token["ids"] = [ids[text] for text in token["tokens"]]
    for key in ("sep", "cls"):
        if isinstance(post_processor.get(key), list):
            post_processor[key] = [post_processor[key][0], ids[post_processor[key][0]]]


def _trim_with_models(folder: Path, needed: set[str]) -> None:
    for path in _models(folder):
        content = path.read_bytes()
        subwords = read_subwords(content)
        learnt = {subword.text: subword.score for subword in subwords if subword.kind == NORMAL}
        texts = {subword.text for subword in subwords}
        kept = (needed & texts) | always_kept(texts, has_bytes=any(_BYTE.fullmatch(text) for text in texts))
        if is_bpe(content):
            made = merges_of(kept, _rank_by_score(learnt))
            kept |= {part for pair in made for part in (*pair, "".join(pair))}
        elif learnt:
            kept.add(min(learnt, key=learnt.__getitem__))
        path.write_bytes(without_others(content, kept))
        needed = needed | kept | {subword.text for subword in subwords if subword.kind != NORMAL}
    vocabulary = _read(folder / VOCABULARY_FILE)
    kept = {subword for subword in vocabulary if subword in needed or _LANGUAGE.fullmatch(subword)}
    ordered = sorted(kept, key=vocabulary.__getitem__)
    ids = {subword: place for place, subword in enumerate(ordered)}
    _write(folder / VOCABULARY_FILE, ids)
    _renumber_added(folder, ids)


def _rank_by_score(scores: Mapping[str, float]) -> Rank:
    """SentencePiece's rule: any two neighbours merge that are a subword together, those of the highest score first."""

    def rank(pair: Pair) -> float | None:
        score = scores.get("".join(pair))
        return None if score is None else -score

    return rank


def _renumber_added(folder: Path, ids: dict[str, int]) -> None:
    """Set the ids of added tokens in a slow tokenizer's settings; those that are no subwords follow the subwords."""
    path = folder / "tokenizer_config.json"
    settings = _read(path)
    decoder = settings.get("added_tokens_decoder") or {}
    for _, token in sorted(decoder.items(), key=lambda entry: int(entry[0])):
        ids.setdefault(token["content"], len(ids))
    if decoder:
        settings["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in decoder.values()}
        _write(path, settings)
    path = folder / "added_tokens.json"
    if path.is_file():
        _write(path, {text: ids[text] for text in _read(path) if text in ids})
