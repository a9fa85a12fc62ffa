"""Read the table that pairs clips with texts: CSV, TSV or JSONL.

Each record becomes one row with all characters of its text (except for spacing), or an error that names file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.corpus.published.presets import KNOWN_SPLITS, SPLIT_NAMES, Preset, recognised
from toolkit.corpus.published.whole_files import is_whole, read_whole
from toolkit.corpus.table_lines import table_lines
from toolkit.corpus.table_records import read_records
from toolkit.errors import UserError
from toolkit.recipe.corpora import TimeUnit
from toolkit.recipe.prompts import CONDITIONS

_AFTER_CONDITIONS = ("signer", "gloss", "pose", "start", "end", "fps", "features", "features_fps")
CLIP_COLUMNS = ("uid", "text", "video", "split", *CONDITIONS, *_AFTER_CONDITIONS)
REQUIRED = ("uid", "text")
BOUNDS = ("start", "end")
RATES = ("fps", "features_fps")
_WANTED = {
    **dict.fromkeys(BOUNDS, "a number such as 12.5, in data.time_unit, or a clock time such as 0:01:02.5"),
    **dict.fromkeys(RATES, "frames per second, such as 12.5"),
}
# Tables of clips that are files of their own often still have these columns: they are read only if the user maps them.
ONLY_WHEN_MAPPED = BOUNDS

# A row takes about 300 bytes in memory, so a table of very short rows would take many times its own size.
MOST_SHORT_ROWS = 500_000
SHORT_ROW = 32
"""Bytes; a table of more than ``MOST_SHORT_ROWS`` rows that are shorter, on average, is refused."""

_SPLIT_WORDS = re.compile(r"[\s_-]*(set|split|data)")  # "Train set", "dev_split"
_NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)
_DECIMAL_COMMA = re.compile(r"\d+,\d+", re.ASCII)
_THOUSANDS = re.compile(r"\d{1,3},\d{3}", re.ASCII)
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
_CLOCK = re.compile(r"(?:(\d{1,3}):)?(\d{1,3}):(\d{1,2}(?:[.,]\d+)?)", re.ASCII)  # hours, minutes, seconds
_PROSE = ("text", "prompt", "context")  # may be written on several lines
_LISTED = ("gloss",)  # may be a list of texts in JSON; of a public corpus, so may the text
_NO_PRESET = Preset()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    uid: str  # the clip's name
    text: str  # its translation
    video: str = ""  # its source video; empty if the table has none
    split: str = ""  # as the table names it; empty if the table has none
    language: str = ""  # sign language; may be empty
    target_language: str = ""  # of the text, as the tokenizer writes it; the same
    prompt: str = ""  # of this clip, in words; the same
    context: str = ""  # what is known from elsewhere, such as the sentence before; the same
    signer: str = ""  # who signs; the same
    gloss: str = ""  # its glosses, separated by spaces; the same
    pose: str = ""  # name of the pose file, if it is neither the uid nor the video
    start: float | None = None  # of the clip within its pose file, in seconds or as the number of a frame
    end: float | None = None  # the same
    fps: float | None = None  # frames per second of the pose file; overrules the file
    features: str = ""  # name of the feature file, if it is neither the uid nor the video
    features_fps: float | None = None  # frames per second of the feature file
    in_frames: bool = False  # whether start and end are numbers of frames, from 0
    line: int = 0  # number of its first line, or of its record, from 1
    numbered: str = "line"  # what the number counts, and in which table if there are several

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.numbered} {self.line}"

    def seconds(self, fps: float) -> tuple[float | None, float | None]:
        """Start and end in seconds of a file of so many frames per second."""
        unit = fps if self.in_frames else 1.0
        return (
            None if self.start is None else self.start / unit,
            None if self.end is None else self.end / unit,
        )


def read_table(
    path: Path,
    columns: Mapping[str, str] | None = None,
    *,
    preset: Preset = _NO_PRESET,
    time_unit: TimeUnit | None = None,
    split: str = "",
    one_of_several: bool = False,
) -> list[Row]:
    """Read a table; the suffix (.jsonl) or the first line (comma, tab, semicolon or bar) gives its format.

    Lines without any value are skipped; every other record is a row or an error.

    Args:
        path: the table; UTF-8, or UTF-16 with a byte order mark. Of a public corpus also one JSON or pickle.
        columns: our name of a column -> the table's name, where they differ.
        preset: of the public corpus whose table it is.
        time_unit: of start and end; None = the preset's.
        split: of rows that name none.
        one_of_several: whether messages must name the table.

    Raises:
        UserError: the table or a column is missing, or a line cannot be read.
    """
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(CLIP_COLUMNS))
    if unknown:
        reversed_pairs = [f"{theirs}={ours}" for ours, theirs in columns.items() if theirs in CLIP_COLUMNS]
        raise UserError(
            f"data.columns maps unknown columns: {', '.join(unknown)}",
            f"write our name first, --columns {','.join(reversed_pairs)}"
            if reversed_pairs
            else f"our names are {', '.join(CLIP_COLUMNS)}: write --columns uid=NAME, with the table's name for it",
        )
    if not path.is_file():
        what = f"{path} is a folder, not a table" if path.is_dir() else f"there is no table {path}"
        raise UserError(what, "set data.table (--table) to a CSV, TSV or JSONL file")
    whole = preset != _NO_PRESET and is_whole(path)
    if whole:
        records, separator = read_whole(path), ""
    else:
        required = [columns.get(name) or next(iter(preset.names(name)), name) for name in REQUIRED]
        records, separator = read_records(table_lines(path), path, required)
    counted = "record" if whole else "line"
    table = _Table(path, columns, preset, time_unit or preset.time_unit, separator == ";", counted, split)
    rows: list[Row] = []
    most = max(MOST_SHORT_ROWS, path.stat().st_size // SHORT_ROW)
    numbered = f"{path.name}, {counted}" if one_of_several else counted
    for row in _rows(records, table, numbered):
        if len(rows) == most:
            raise UserError(
                f"{path} has more than {most:,} rows, of fewer than {SHORT_ROW} bytes on average",
                "check data.table (--table): one row for each clip, with its uid and its text",
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no rows", "write a header and one line for each clip")
    return rows


@dataclass(frozen=True)
class _Table:
    """How the values of a table are read."""

    path: Path
    columns: Mapping[str, str]  # that the user maps: our name -> theirs
    preset: Preset
    time_unit: TimeUnit
    decimal_comma: bool
    counted: str  # what its numbers count: line or record
    split: str  # of rows that name none

    def candidates(self) -> dict[str, list[str]]:
        """What the table may call each of our columns; those that are not read are left out."""
        found = {}
        for name in CLIP_COLUMNS:
            if name in self.columns:
                found[name] = [self.columns[name]]
            elif name not in ONLY_WHEN_MAPPED or self.preset.names(name):
                found[name] = [*self.preset.names(name), name]
        return found


def _rows(records: Iterable[tuple[int, Mapping[str, Any]]], table: _Table, numbered: str) -> Iterator[Row]:
    """Convert records to rows, with our names of the columns."""
    preset = table.preset
    listed = (*_LISTED, "text") if preset != _NO_PRESET else _LISTED
    candidates = table.candidates()
    for line, record in records:
        where = f"{table.path}, {table.counted} {line}"
        values: dict[str, Any] = dict.fromkeys(ONLY_WHEN_MAPPED, "")
        for name, names in candidates.items():
            source = names[0] if len(names) == 1 else next((theirs for theirs in names if theirs in record), names[0])
            if source not in record and (name in REQUIRED or name in table.columns):
                raise UserError(
                    f"{where} has no column '{source}' (it has {_column_names(record)})",
                    _which_column(name, record),
                )
            value = record.get(source, "")
            if name in listed and isinstance(value, list) and all(isinstance(word, str) for word in value):
                value = " ".join(value)
            values[name] = _text(value, name, where)
        values |= {name: " ".join(values[name].split()) for name in (*_PROSE, *_LISTED)}
        values |= {name: values[name].replace(" ", "") for name in preset.unspaced}
        values["split"] = _split(values["split"] or table.split, where)
        values["language"] = values["language"] or preset.language
        values |= {name: _number(values[name], name, where, table.decimal_comma) for name in RATES}
        values |= _bounds(values["start"], values["end"], table, where)
        yield Row(**values, line=line, numbered=numbered)


def _bounds(start: str, end: str, table: _Table, where: str) -> dict[str, Any]:
    """Start and end in seconds, or as numbers of frames, and which of the two."""
    clocks = [":" in value for value in (start, end) if value]
    in_frames = table.time_unit == "frames" and not any(clocks)
    if any(clocks) and not all(clocks) and table.time_unit != "seconds":
        raise UserError(
            f"{where}: of start '{start[:40]}' and end '{end[:40]}' one is a clock time, the other one in "
            f"{table.time_unit}",
            "write both in one unit",
        )
    unit = 1000.0 if table.time_unit == "milliseconds" and not any(clocks) else 1.0
    values: dict[str, Any] = {"in_frames": in_frames}
    for name, value in (("start", start), ("end", end)):
        number = _clock(value) if ":" in value else _number(value, name, where, table.decimal_comma)
        if ":" in value and number is None:
            raise UserError(f"{where}: {name} is '{value[:40]}'", f"write {_WANTED[name]}, or leave it empty")
        values[name] = None if number is None else number / unit
    return values


def _clock(value: str) -> float | None:
    """The seconds of a clock time, ``[hours:]minutes:seconds``; None if it is none."""
    if not (match := _CLOCK.fullmatch(value)):
        return None
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def _text(value: object, name: str, where: str) -> str:
    """A value as text; of JSON's other values only null, whole numbers as names, and numbers where numbers belong."""
    if value is None or value == "":
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (name in _WANTED or (isinstance(value, int) and name not in _PROSE)):
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {name} is {str(value)[:40]!r} of type {type(value).__name__}",
            "write one text in quotes, or null",
        )
    if found := _NO_CHARACTER.search(value):
        raise UserError(f"{where}: {name} holds {found[0]!a}, which is no character", "remove it")
    value = value.strip()
    if name not in (*_PROSE, *_LISTED) and len(value.splitlines()) > 1:
        raise UserError(f"{where}: the {name} contains a line end", f"write the {name} on one line")
    return value


def _split(value: str, where: str) -> str:
    """The name of a split in a corpus: "TRAIN set" is train, and "Validation" is dev."""
    name = value.lower()
    bare = _SPLIT_WORDS.sub("", name)
    name = bare if bare in KNOWN_SPLITS else name
    name = SPLIT_NAMES.get(name, name)
    # A split is a folder of the corpus, and preparation itself makes and removes a folder `progress`.
    if name == "progress" or (name and not re.fullmatch("[a-z0-9_-]{1,64}", name)):
        raise UserError(
            f"{where}: '{value[:40]}' cannot be the name of a split",
            "write train, dev, test or another name of a-z, 0-9, _ and - only",
        )
    return name


def _number(value: str, name: str, where: str, decimal_comma: bool) -> float | None:
    if not value:
        return None
    # 1,234 is a decimal number if semicolons separate the values, and ambiguous otherwise.
    if _DECIMAL_COMMA.fullmatch(value) and (decimal_comma or not _THOUSANDS.fullmatch(value)):
        value = value.replace(",", ".")
    number = float(value) if _NUMBER.fullmatch(value) else float("inf")
    if number == float("inf"):
        raise UserError(f"{where}: {name} is '{value[:40]}'", f"write {_WANTED[name]}, or leave it empty")
    return number


def _which_column(name: str, record: Mapping[str, Any]) -> str:
    """The remedy for a table without one of our columns."""
    if len(record) == 1:
        return "begin the table with the line uid,text and separate its columns by commas or tabs"
    source = recognised(list(record))
    if source is not None and name in REQUIRED and name not in record:
        return f"give data.source={source} (--source {source}), whose table this seems to be"
    spelled = next((column for column in record if column.casefold() == name), None)
    theirs = spelled or "NAME"
    mapped = f"name the column of the {name} by data.columns.{name}={theirs} (--columns {name}={theirs})"
    before = "; where the first line is a clip, write one with the names of the columns before it"
    return mapped if spelled else mapped + before


def _column_names(record: Mapping[str, Any]) -> str:
    names = [" ".join(name.split()) for name in list(record)[:8]]
    names = [name if len(name) <= 40 else name[:40] + "..." for name in names]
    return ", ".join(names) + (", ..." if len(record) > 8 else "")
