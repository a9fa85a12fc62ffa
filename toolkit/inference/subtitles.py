"""Translations with time stamps as subtitle files: SubRip (``.srt``) and WebVTT (``.vtt``)."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from itertools import pairwise

from toolkit.corpus.names import one_line
from toolkit.inference.translate_files import Translation

LINE_WIDTH = 42  # characters, as subtitlers have it


@dataclass(frozen=True)
class Cue:
    """A text and when it is shown, in seconds."""

    start: float
    end: float
    text: str


def cues(translation: Translation) -> list[Cue]:
    """The texts of a clip's windows; of two that overlap, the second begins in the middle of the overlap."""
    windows = translation.windows
    turns = [(left.end + right.start) / 2 for left, right in pairwise(windows)]
    starts, ends = [windows[0].start, *turns], [*turns, windows[-1].end]
    return [
        Cue(start, end, text) for start, end, text in zip(starts, ends, translation.texts, strict=True) if text.strip()
    ]


def to_srt(translation: Translation) -> str:
    """The text of an ``.srt`` file."""
    blocks = [
        f"{number}\n{timestamp(cue.start, ',')} --> {timestamp(cue.end, ',')}\n{_lines(cue.text.replace('-->', '→'))}\n"
        for number, cue in enumerate(cues(translation), start=1)
    ]
    return "\n".join(blocks)


def to_vtt(translation: Translation) -> str:
    """The text of a ``.vtt`` file."""
    blocks = [
        f"{timestamp(cue.start)} --> {timestamp(cue.end)}\n{html.escape(_lines(cue.text), quote=False)}\n"
        for cue in cues(translation)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def timestamp(seconds: float, decimal_mark: str = ".") -> str:
    """``hh:mm:ss.mmm``."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{decimal_mark}{rest % 1000:03d}"


def _lines(text: str) -> str:
    """Short lines; an empty one would end the cue."""
    return "\n".join(textwrap.wrap(one_line(text), LINE_WIDTH))
