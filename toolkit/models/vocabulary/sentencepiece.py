"""The subwords of a SentencePiece model file, read and removed without its library's protocol buffers.

A model is a message of fields; field 1, once for each subword, is a message of text (1), score (2) and kind (3). All
other fields (normaliser, trainer's settings) are copied as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL = 1  # kind of a subword that was learnt; control, unknown, user-defined and byte subwords have others
_SUBWORDS, _TRAINER = 1, 2  # fields of a model
_MODEL_TYPE = 3  # field of the trainer's settings
_BPE = 2


@dataclass(frozen=True)
class Subword:
    """One subword of a model."""

    text: str
    score: float
    kind: int


def read_subwords(model: bytes) -> list[Subword]:
    """The subwords of a model, in their order.

    Raises:
        ValueError: it is no SentencePiece model.
    """
    return [
        _subword(content) for field, content, _ in _fields(model) if field == _SUBWORDS and isinstance(content, bytes)
    ]


def is_bpe(model: bytes) -> bool:
    """Whether a model merges pairs; else it is a unigram model."""
    for field, content, _ in _fields(model):
        if field == _TRAINER and isinstance(content, bytes):
            return any(inner == _MODEL_TYPE and value == _BPE for inner, value, _ in _fields(content))
    return False


def without_others(model: bytes, kept: set[str]) -> bytes:
    """The model with these of its subwords alone, and those that were not learnt."""
    result = bytearray()
    for field, content, raw in _fields(model):
        if field == _SUBWORDS and isinstance(content, bytes):
            subword = _subword(content)
            if subword.kind == NORMAL and subword.text not in kept:
                continue
        result += raw
    return bytes(result)


def _subword(content: bytes) -> Subword:
    text, score, kind = "", 0.0, NORMAL
    for field, value, _ in _fields(content):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif field == 3 and isinstance(value, int):
            kind = value
    return Subword(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Each field of a message: its number, its value (bytes where it is not a whole number), and its own bytes."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _number(message, place)
        value: int | bytes
        match tag & 7:
            case 0:
                value, place = _number(message, place)
            case 1:
                value, place = message[place : place + 8], place + 8
            case 2:
                size, place = _number(message, place)
                value, place = message[place : place + size], place + size
            case 5:
                value, place = message[place : place + 4], place + 4
            case other:
                raise ValueError(f"no SentencePiece model: a field has wire type {other}")
        if place > len(message):
            raise ValueError("no SentencePiece model: it ends inside a field")
        yield tag >> 3, value, message[start:place]


def _number(message: bytes, place: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, and the place behind it."""
    number = shift = 0
    while True:
        if place >= len(message):
            raise ValueError("no SentencePiece model: it ends inside a number")
        byte = message[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
