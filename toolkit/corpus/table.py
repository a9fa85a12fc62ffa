"""Read the table that pairs clips with texts: CSV, TSV or JSONL, from whoever made it.

Nothing in a table is trusted: lines have a largest length, columns are looked up by name, and every complaint says
which file, which line and what to do.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import UserError

LONGEST_LINE = 1 << 20
"""Characters; no sentence is that long, but a binary file that was given by mistake may be."""

COLUMNS = ("uid", "text", "video", "split", "language", "pose", "start", "end", "fps")
REQUIRED = ("uid", "text")
# A table of clips that were cut long ago often still says where: times count only when the user maps them.
ONLY_WHEN_MAPPED = ("start", "end")
PRESETS: dict[str, dict[str, str]] = {
    "isign": {"uid": "uid", "text": "text"},
    "how2sign": {"uid": "SENTENCE_NAME", "text": "SENTENCE", "video": "VIDEO_ID"},
}
"""What the public tables of some corpora call their columns."""

SPLIT_NAMES = {"training": "train", "val": "dev", "valid": "dev", "validation": "dev", "development": "dev"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        uid, text: the clip's name and what it says.
        video: its source video; empty when the table does not tell.
        split: as the table gives it; empty when it does not.
        language: sign language; may be empty.
        pose: name of the pose file, when it is neither the uid nor the video.
        start, end: seconds of the clip within its pose file.
        fps: frames per second of the pose file, for arrays that do not tell; it overrules the file.
        line: where it stands, counted from 1 as an editor does.
    """

    uid: str
    text: str
    video: str = ""
    split: str = ""
    language: str = ""
    pose: str = ""
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    line: int = 0


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read a table; its format is told by the suffix (.jsonl) or by its first line (comma, tab, semicolon or bar).

    Args:
        path: the table; UTF-8, with or without a byte order mark.
        columns: our name of a column -> the table's, for those that differ.

    Raises:
        UserError: the table or a column is missing, or a line cannot be read.
    """
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise UserError(
            f"data.columns names {', '.join(unknown)}, which mean nothing here: known are {', '.join(COLUMNS)}"
        )
    if not path.is_file():
        raise UserError(f"there is no table {path}: data.table wants a CSV, TSV or JSONL file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = _bounded_lines(file, path)
            records = _json_records(lines, path) if path.suffix in (".jsonl", ".ndjson") else _csv_records(lines, path)
            rows = list(_rows(records, columns, path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} is not readable as CSV: {error}") from error
    if not rows:
        raise UserError(f"{path} holds no rows: a header line and one line a clip are wanted")
    return rows


def _bounded_lines(file: Iterable[str], path: Path) -> Iterator[str]:
    """The lines of a file, none of them read further than the longest that makes sense."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):  # type: ignore[attr-defined]
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE:,} characters: is this a table?")
        if "\0" in line:
            raise UserError(f"{path}, line {number} holds a NUL character: is this a text file?")
        yield line


def _csv_records(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Line number and values by column name; the header's most frequent separator is the separator."""
    header_line = next(lines, "")
    separator = max("\t,;|", key=header_line.count)
    names = [name.strip() for name in next(csv.reader([header_line], delimiter=separator), [])]
    if len(set(names)) != len(names):
        raise UserError(f"{path} names a column twice: {', '.join(names)}")
    reader = csv.reader(lines, delimiter=separator, strict=False)
    for values in reader:
        if not values:
            continue
        if len(values) > len(names):
            raise UserError(
                f"{path}, line {reader.line_num + 1} has {len(values)} values for {len(names)} columns: "
                "quote texts that hold the separator"
            )
        yield reader.line_num + 1, dict(zip(names, values + [""] * (len(names) - len(values)), strict=True))


def _json_records(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a JSON object")
        yield number, {str(key): "" if value is None else str(value) for key, value in record.items()}


def _rows(records: Iterable[tuple[int, Mapping[str, str]]], columns: Mapping[str, str], path: Path) -> Iterator[Row]:
    """Records become rows under our names of the columns."""
    for number, record in records:
        values = {}
        for name in COLUMNS:
            source = columns.get(name, "" if name in ONLY_WHEN_MAPPED else name)
            if source not in record and (name in REQUIRED or name in columns):
                raise UserError(
                    f"{path}, line {number} has no column '{source}' (it has {_few(record)}): "
                    f"say which holds the {name} with data.columns.{name}=NAME"
                )
            values[name] = record.get(source, "").strip()
        split = values["split"].lower()
        yield Row(
            uid=values["uid"],
            text=" ".join(values["text"].split()),
            video=values["video"],
            split=SPLIT_NAMES.get(split, split),
            language=values["language"],
            pose=values["pose"],
            start=_number(values["start"], "start", "seconds from the beginning of the file", path, number),
            end=_number(values["end"], "end", "seconds from the beginning of the file", path, number),
            fps=_number(values["fps"], "fps", "frames per second", path, number),
            line=number,
        )


def _number(value: str, name: str, wanted: str, path: Path, line: int) -> float | None:
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UserError(f"{path}, line {line}: {name} is '{value[:40]}', wanted {wanted}")
    return number


def _few(record: Mapping[str, str]) -> str:
    names = [name if len(name) <= 40 else name[:40] + "..." for name in list(record)[:8]]
    return ", ".join(names) + (", ..." if len(record) > 8 else "")
