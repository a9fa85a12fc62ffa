"""Read the table that pairs clips with texts: CSV, TSV or JSONL.

Each record becomes one row with all characters of its text (except for spacing), or an error that names file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.corpus.table_lines import table_lines
from toolkit.corpus.table_records import read_records
from toolkit.errors import UserError
from toolkit.recipe.prompts import CONDITIONS

CLIP_COLUMNS = ("uid", "text", "video", "split", *CONDITIONS, "pose", "start", "end", "fps", "features", "features_fps")
REQUIRED = ("uid", "text")
_SECONDS = "seconds from the beginning of the file"
NUMBERS = {"start": _SECONDS, "end": _SECONDS, "fps": "frames per second", "features_fps": "frames per second"}
# Tables of clips that are files of their own often still have these columns: they are read only if the user maps them.
ONLY_WHEN_MAPPED = ("start", "end")
PRESETS: dict[str, dict[str, str]] = {
    "isign": {"uid": "uid", "text": "text"},
    "how2sign": {"uid": "SENTENCE_NAME", "text": "SENTENCE", "video": "VIDEO_ID"},
}
"""The names of columns in the tables of public corpora: our name -> theirs."""

# A row takes about 300 bytes in memory, so a table of very short rows would take many times its own size.
MOST_SHORT_ROWS = 500_000
SHORT_ROW = 32
"""Bytes; a table of more than ``MOST_SHORT_ROWS`` rows that are shorter, on average, is refused."""

SPLIT_NAMES = {
    "training": "train",
    **dict.fromkeys(("val", "valid", "validation", "development"), "dev"),
    "testing": "test",
}
_KNOWN_SPLITS = {"train", "dev", "test", *SPLIT_NAMES}
_SPLIT_WORDS = re.compile(r"[\s_-]*(set|split|data)")  # "Train set", "dev_split"
_NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)
_DECIMAL_COMMA = re.compile(r"\d+,\d+", re.ASCII)
_THOUSANDS = re.compile(r"\d{1,3},\d{3}", re.ASCII)
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
_PROSE = ("text", "prompt", "context")  # may be written on several lines


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
    pose: str = ""  # name of the pose file, if it is neither the uid nor the video
    start: float | None = None  # seconds of the clip within its pose file
    end: float | None = None  # the same
    fps: float | None = None  # frames per second of the pose file; overrules the file
    features: str = ""  # name of the feature file, if it is neither the uid nor the video
    features_fps: float | None = None  # frames per second of the feature file
    line: int = 0  # number of its first line, from 1


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read a table; the suffix (.jsonl) or the first line (comma, tab, semicolon or bar) gives its format.

    Lines without any value are skipped; every other record is a row or an error.

    Args:
        path: the table; UTF-8, or UTF-16 with a byte order mark.
        columns: our name of a column -> the table's name, where they differ.

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
    required = [columns.get(name, name) for name in REQUIRED]
    records, separator = read_records(table_lines(path), path, required)
    rows: list[Row] = []
    most = max(MOST_SHORT_ROWS, path.stat().st_size // SHORT_ROW)
    for row in _rows(records, columns, path, decimal_comma=separator == ";"):
        if len(rows) == most:
            raise UserError(
                f"{path} has more than {most:,} rows, of fewer than {SHORT_ROW} bytes on average",
                "check data.table (--table): one row for each clip, with its uid and its text",
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no rows", "write a header and one line for each clip")
    return rows


def _rows(
    records: Iterable[tuple[int, Mapping[str, Any]]], columns: Mapping[str, str], path: Path, decimal_comma: bool
) -> Iterator[Row]:
    """Convert records to rows, with our names of the columns."""
    for line, record in records:
        values: dict[str, Any] = {}
        for name in CLIP_COLUMNS:
            source = columns.get(name, None if name in ONLY_WHEN_MAPPED else name)
            if source not in record and (name in REQUIRED or name in columns):
                raise UserError(
                    f"{path}, line {line} has no column '{source}' (it has {_column_names(record)})",
                    _which_column(name, record),
                )
            values[name] = "" if source is None else _text(record.get(source, ""), name, path, line)
        values |= {name: " ".join(values[name].split()) for name in _PROSE}
        values["split"] = _split(values["split"], path, line)
        values |= {name: _number(values[name], name, path, line, decimal_comma) for name in NUMBERS}
        yield Row(**values, line=line)


def _text(value: object, name: str, path: Path, line: int) -> str:
    """A value as text; of JSON's other values only null, whole numbers as names, and numbers where numbers belong."""
    if value is None or value == "":
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (name in NUMBERS or (isinstance(value, int) and name not in _PROSE)):
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{path}, line {line}: {name} is {str(value)[:40]!r} of type {type(value).__name__}",
            "write one text in quotes, or null",
        )
    if found := _NO_CHARACTER.search(value):
        raise UserError(f"{path}, line {line}: {name} holds {found[0]!a}, which is no character", "remove it")
    value = value.strip()
    if name not in _PROSE and len(value.splitlines()) > 1:
        raise UserError(f"{path}, line {line}: the {name} contains a line end", f"write the {name} on one line")
    return value


def _split(value: str, path: Path, line: int) -> str:
    """The name of a split in a corpus: "TRAIN set" is train, and "Validation" is dev."""
    name = value.lower()
    bare = _SPLIT_WORDS.sub("", name)
    name = bare if bare in _KNOWN_SPLITS else name
    name = SPLIT_NAMES.get(name, name)
    # A split is a folder of the corpus, and preparation itself makes and removes a folder `progress`.
    if name == "progress" or (name and not re.fullmatch("[a-z0-9_-]{1,64}", name)):
        raise UserError(
            f"{path}, line {line}: '{value[:40]}' cannot be the name of a split",
            "write train, dev, test or another name of a-z, 0-9, _ and - only",
        )
    return name


def _number(value: str, name: str, path: Path, line: int, decimal_comma: bool) -> float | None:
    if not value:
        return None
    # 1,234 is a decimal number if semicolons separate the values, and ambiguous otherwise.
    if _DECIMAL_COMMA.fullmatch(value) and (decimal_comma or not _THOUSANDS.fullmatch(value)):
        value = value.replace(",", ".")
    number = float(value) if _NUMBER.fullmatch(value) else float("inf")
    if number == float("inf"):
        raise UserError(
            f"{path}, line {line}: {name} is '{value[:40]}'", f"write {NUMBERS[name]}, such as 12.5, or leave it empty"
        )
    return number


def _which_column(name: str, record: Mapping[str, Any]) -> str:
    """The remedy for a table without one of our columns."""
    if len(record) == 1:
        return "begin the table with the line uid,text and separate its columns by commas or tabs"
    source = next((source for source, columns in PRESETS.items() if record.keys() >= set(columns.values())), None)
    if source is not None and name in REQUIRED and name not in record:
        given = " ".join(f"data.columns.{ours}={theirs}" for ours, theirs in PRESETS[source].items())
        return f"give prepare.py --source {source}, or a recipe {given}"
    spelled = next((column for column in record if column.casefold() == name), None)
    theirs = spelled or "NAME"
    mapped = f"name the column of the {name} by data.columns.{name}={theirs} (--columns {name}={theirs})"
    before = "; where the first line is a clip, write one with the names of the columns before it"
    return mapped if spelled else mapped + before


def _column_names(record: Mapping[str, Any]) -> str:
    names = [" ".join(name.split()) for name in list(record)[:8]]
    names = [name if len(name) <= 40 else name[:40] + "..." for name in names]
    return ", ".join(names) + (", ..." if len(record) > 8 else "")
