"""Parse the lines of a table into records, under the table's own names of the columns.

No character is lost: a line whose values are ambiguous is an error that names it. The ``csv`` module accepts such lines
and merges or drops texts, so this parser replaces it. CSV has quotes as in RFC 4180; in tables with tabs a quote is a
character like others.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.corpus.table_lines import LONGEST_LINE, NumberedLines
from toolkit.errors import UserError

Records = Iterator[tuple[int, Mapping[str, Any]]]
"""The number of the line on which each record begins, and its values by column."""

MOST_COLUMNS = 1000

# jq: {"clip1": {"text": ...}, ...} becomes {"uid": "clip1", "text": ...} and so on.
_ENTRIES = "'to_entries[] | {uid: .key} + .value'"
_SEPARATORS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\1*', re.IGNORECASE)  # Excel's first line, when it has one
_SPACES = re.compile(" *")
_REST_OF_QUOTED = re.compile(r'((?:[^"]++|"")*+)"[ ]*')
_SPREADSHEETS_QUOTES = re.compile(r'"((?:[^"]++|"")*+)"')


def read_records(lines: NumberedLines, path: Path, required: Sequence[str]) -> tuple[Records, str]:
    """The records of a table, and its separator ("" for JSONL).

    JSONL is recognised by its suffix or its first character. Otherwise the first line is the header, and its most
    frequent separator is the separator, unless Excel's ``sep=`` comes before it.

    ``required`` are names of columns that every table needs.

    Raises:
        UserError: here or from the iterator: a line cannot be read.
    """
    first = next(((number, line) for number, line in lines if line.strip(_SEPARATORS + ' "')), None)
    if first is None:
        return iter(()), ""
    number, line = first
    if line.lstrip().startswith("[{") or line.strip() == "[":
        raise UserError(
            f"{path} is one JSON list", f"write one object a line: jq -c '.[]' {shlex.quote(str(path))} > NEW.jsonl"
        )
    if line.strip() == "{":
        raise _one_object(
            path, f"jq -c {_ENTRIES if _opens_object(lines) else '.'} {shlex.quote(str(path))} > NEW.jsonl"
        )
    if path.suffix.lower() in (".jsonl", ".ndjson") or line.lstrip().startswith("{"):
        return _json_records(itertools.chain([first], lines), path), ""
    given = _SEPARATOR_LINE.fullmatch(line.strip(" "))
    if given:
        number, line = next(lines, (number + 1, ""))
    separator = given[1] if given else _separator(line, required)
    return _delimited_records(itertools.chain([(number, line)], lines), separator, path, required), separator


def _opens_object(lines: NumberedLines) -> bool:
    """Whether the first value of an object that is written on several lines is an object."""
    line = next((line for _, line in lines if line.strip()), "")
    return line.rstrip().endswith("{")


def _one_object(path: Path, command: str) -> UserError:
    return UserError(
        f"{path} is one JSON object on several lines or with all clips", f"write one object a line: {command}"
    )


def _separator(header: str, required: Sequence[str]) -> str:
    """The most frequent separator of a header among those that separate the required columns, outside of quotes."""

    def fits(separator: str) -> tuple[bool, int]:
        names = {name.strip(' "') for name in header.split(separator)}
        return names.issuperset(required), re.sub('"[^"]*"', "", header).count(separator)

    return max(_SEPARATORS, key=fits)


@dataclass(frozen=True)
class _Form:
    """The format of a delimited table."""

    path: Path
    separator: str  # between two values
    quotes: bool  # whether quotes have their meaning in CSV
    columns: int  # number of values of the header

    @property
    def hint(self) -> str:
        """The remedy for a text that contains the separator."""
        return "quote texts that contain the separator" if self.quotes else "remove the tabs from the text"

    def looks_like_row(self, text: str, values: int, beside: str) -> bool:
        """Whether a text within quotes has at least as many values as a row has there.

        A separator with a space behind it is taken for prose, unless the text before it has the shape of ``beside``,
        the first value of the row.
        """
        first, _, rest = text.partition(self.separator)
        prose = rest.startswith(" ") and rest.strip() and (not beside or _shape(first) != _shape(beside))
        return text.count(self.separator) + 1 >= values and not prose


def _shape(name: str) -> str:
    """The shape that numbered names share: 1782bea75c7d-7 and 17a-21 are both 0-0, a word is a."""
    return re.sub(r"[^\W_]+", lambda run: "0" if any(map(str.isdigit, run[0])) else "a", name.strip(' "'))


def _alike(values: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lines begin with numbered names of clips of one shape."""
    shape = _shape(values[0])
    return shape == _shape(others[0]) and "0" in shape


def _delimited_records(lines: NumberedLines, separator: str, path: Path, required: Sequence[str]) -> Records:
    number, line = next(lines)
    # A quoted header means that everything is quoted (csv.QUOTE_ALL), in tables with tabs as well.
    quotes = separator != "\t" or line.startswith('"')
    form = _Form(path, separator, quotes, line.count(separator) + 1)
    header = _values(number, line, lines, form)
    names = _names(header, number, path)
    form = replace(form, columns=len(names))
    reaches = max((names.index(name) + 1 for name in required if name in names), default=0)
    short: list[str] = []  # the values of the line before, if they were too few
    beyond = None
    for number, line in lines:
        values = _values(number, line, lines, form)
        filled = max((index + 1 for index, value in enumerate(values) if value.strip()), default=0)
        if not filled:
            continue
        if sorted(value.strip() for value in values[:filled]) == sorted(names):
            raise UserError(
                f"{path}, line {number} is a second header", "remove it; all rows need their columns in one order"
            )
        _check_columns(values[:filled], names, number, form)
        # Separators at the end of all rows come from the program that wrote them, at the end of some from a text.
        more = max(0, len(values) - len(header))
        if more != (beyond := more if beyond is None else beyond):
            raise UserError(
                f"{path}, line {number} ends in {more} separators beyond the last column, and other lines in {beyond}",
                f"{form.hint}, or remove the separators",
            )
        if not quotes and len(values) < len(header) and values[-1].count('"') % 2 and values[-1].startswith('"'):
            raise _wrong_count(number, len(values), form)
        # Some programs leave out separators at the end of lines; a line end within a text looks similar.
        if len(values) < reaches or (
            short and len(values) + len(short) == len(names) + 1 and not _alike(short, values)
        ):
            raise _wrong_count(number, len(values), form)
        short = values if len(values) < len(names) else []
        yield number, dict(itertools.zip_longest(names, values[: len(names)], fillvalue=""))


def _check_columns(values: Sequence[str], names: Sequence[str], number: int, form: _Form) -> None:
    """Raise an error for a value without a column, which means that a text contains the separator.

    Columns before the first name, such as the index that pandas writes, may have any values.
    """
    if len(values) > len(names):
        raise UserError(
            f"{form.path}, line {number} has {len(values)} values for {len(names)} columns",
            f"{form.hint}, or name all columns in the header",
        )
    first_named = next((index for index, name in enumerate(names) if name), 0)
    for index in range(first_named, len(values)):
        if not names[index] and values[index].strip():
            raise UserError(
                f"{form.path}, line {number} has a value in column {index + 1}, which has no name",
                f"{form.hint}, or name the column in the header",
            )


def _names(values: list[str], number: int, path: Path) -> list[str]:
    """The names of the columns without the nameless ones at the end, which spreadsheets leave."""
    names = [" ".join(value.split()) for value in values]
    while names and not names[-1]:
        names.pop()
    if len(names) > MOST_COLUMNS:
        raise UserError(
            f"{path}, line {number} is a header of {len(names):,} columns, more than {MOST_COLUMNS:,}",
            "check data.table (--table): a CSV, TSV or JSONL file with one line for each clip",
        )
    twice = next((name for index, name in enumerate(names) if name and name in names[:index]), None)
    if twice is not None:
        raise UserError(f"{path}, line {number} names a column twice: {twice[:40]}", "rename one of them")
    return names


def _wrong_count(number: int, values: int, form: _Form) -> UserError:
    remedy = "quote texts that contain line ends" if form.quotes else "write each text on one line"
    return UserError(
        f"{form.path}, line {number} has {values} values for {form.columns} columns",
        f"{remedy}; keep the separators of empty values",
    )


def _values(number: int, line: str, lines: NumberedLines, form: _Form) -> list[str]:
    """The values of the record that begins with a line; quoted values read more lines from ``lines``."""
    if '"' not in line:
        return line.split(form.separator)
    if not form.quotes:
        return [_unquoted_where_certain(value) for value in line.split(form.separator)]
    values: list[str] = []
    position = 0
    while True:
        opens = _SPACES.match(line, position).end()  # type: ignore[union-attr]  # matches without spaces, too
        if line.startswith('"', opens):
            value, line, position = _quoted(number, line, opens, lines, values, form)
        else:
            end = _end_of_value(line, position, form)
            value, position = line[position:end], end
        values.append(value)
        if position >= len(line):
            return values
        position += 1


def _end_of_value(line: str, position: int, form: _Form) -> int:
    end = line.find(form.separator, position)
    return end if end >= 0 else len(line)


def _quoted(
    number: int, line: str, opens: int, lines: NumberedLines, before: Sequence[str], form: _Form
) -> tuple[str, str, int]:
    """Read a value in quotes that follows others of its record.

    Returns:
        the value, the line on which it ends, and the position behind it in that line.

    Raises:
        UserError: the quote is never closed, closes within a value, or spans lines that look like rows.
    """
    first, begins, last = line, opens + 1, number
    beside = before[0] if before else ""
    parts: list[str] = []
    length = 0
    while (rest := _REST_OF_QUOTED.match(line, begins)) is None:
        if last > number and form.looks_like_row(line, form.columns, beside):
            raise _open_quote(number, f"spans line {last}, which looks like a row", form)
        parts.append(line[begins:])
        length += len(parts[-1]) + 1
        begins = 0
        last, line = next(lines, (0, ""))
        if not last or length > LONGEST_LINE:
            raise _open_quote(number, "is never closed", form)
    end = rest.end()
    row_is_complete = first.count(form.separator, opens) >= form.columns - len(before) - 1
    if parts and row_is_complete and form.looks_like_row(rest[1], len(before) + 1, beside):
        raise _open_quote(number, f"closes in line {last}, which looks like a row", form)
    if end < len(line) and line[end] != form.separator:
        stop = _end_of_value(line, end, form)
        # "Stop" he says: the quotes can only be part of the text.
        if parts or form.separator in rest[1] or line[end:stop].rstrip().endswith('"'):
            raise _open_quote(number, f"closes within a value (line {last})", form)
        return line[opens:stop], line, stop
    parts.append(rest[1])
    return "\n".join(parts).replace('""', '"'), line, end


def _open_quote(number: int, what: str, form: _Form) -> UserError:
    return UserError(
        f"{form.path}, line {number}: a quote that opens here {what}",
        "close the quote at the end of its value, on the same line; in a text that contains quotes, double them and "
        'quote the text: say "hi" becomes "say ""hi"""',
    )


def _unquoted_where_certain(value: str) -> str:
    """A value of a table with tabs; quotes are removed only if quotes within it are doubled, as spreadsheets do."""
    quoted = _SPREADSHEETS_QUOTES.fullmatch(value.strip(" "))
    return quoted[1].replace('""', '"') if quoted and '""' in quoted[1] else value


def _json_records(lines: NumberedLines, path: Path) -> Records:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_refuse_repeated_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}", "write one JSON object a line") from error
        if isinstance(record, dict) and record and all(isinstance(value, dict) for value in record.values()):
            raise _one_object(path, _converted(record, path))
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a JSON object", "write one JSON object a line")
        yield number, record


def _converted(record: Mapping[str, Mapping[str, Any]], path: Path) -> str:
    """The command that converts an object of one object for each clip, or for each column, as pandas writes."""
    if len({tuple(value) for value in record.values()}) == 1 and all(map(str.isdecimal, next(iter(record.values())))):
        return "pandas.read_json(…).to_json(…, orient='records', lines=True)"
    return f"jq -c {_ENTRIES} {shlex.quote(str(path))} > NEW.jsonl"


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"it names '{name[:40]}' twice")
        record[name] = value
    return record
