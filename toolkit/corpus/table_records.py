"""The records of a table: what its lines say under the table's own names of the columns.

No character is lost on the way: a line whose values cannot be told for sure is an error that names it. CSV has quotes,
as RFC 4180 says; in tables with tabs a quote is a character like others.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.corpus.table_lines import LONGEST_LINE, Lines
from toolkit.errors import UserError

Records = Iterator[tuple[int, Mapping[str, Any]]]
"""The line on which each begins, and its values by column."""

_SEPARATORS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\1*', re.IGNORECASE)  # Excel's first line, when it has one
_SPACES = re.compile(" *")
_REST_OF_QUOTED = re.compile(r'((?:[^"]++|"")*+)"[ ]*')
_SPREADSHEETS_QUOTES = re.compile(r'"((?:[^"]++|"")*+)"')


def read_records(lines: Lines, path: Path, required: Sequence[str]) -> tuple[Records, str]:
    """The records of a table.

    JSONL is told by its suffix or its first character. Otherwise the first line is the header, and its most frequent
    separator is the separator, unless Excel's ``sep=`` stands before it.

    Args:
        lines: of the file.
        path: for messages, and its suffix.
        required: names of columns without which there is no clip.

    Returns:
        the records, and the separator ("" for JSONL).

    Raises:
        UserError: here or from the iterator: a line cannot be read.
    """
    first = next(((number, line) for number, line in lines if line.strip(_SEPARATORS + ' "')), None)
    if first is None:
        return iter(()), ""
    number, line = first
    if line.lstrip().startswith("[{") or line.strip() == "[":
        raise UserError(f"{path} is one JSON list: write one object a line (jq -c '.[]' {path.name} > NEW.jsonl)")
    if path.suffix.lower() in (".jsonl", ".ndjson") or line.lstrip().startswith("{"):
        return _json_records(itertools.chain([first], lines), path), ""
    given = _SEPARATOR_LINE.fullmatch(line.strip(" "))
    if given:
        number, line = next(lines, (number + 1, ""))
    separator = given[1] if given else _separator(line, required)
    return _delimited_records(itertools.chain([(number, line)], lines), separator, path, required), separator


def _separator(header: str, required: Sequence[str]) -> str:
    """Of the separators that part the required columns the most frequent in a header; quoted ones do not count."""

    def fits(separator: str) -> tuple[bool, int]:
        names = {name.strip(' "') for name in header.split(separator)}
        return names.issuperset(required), re.sub('"[^"]*"', "", header).count(separator)

    return max(_SEPARATORS, key=fits)


@dataclass(frozen=True)
class _Form:
    """How the lines of a delimited table are written.

    Attributes:
        separator: between two values.
        quotes: whether quotes have CSV's meaning.
        columns: how many values the header has.
    """

    path: Path
    separator: str
    quotes: bool
    columns: int

    @property
    def remedy(self) -> str:
        """For a text that holds the separator."""
        return "quote texts that hold the separator" if self.quotes else "take the tabs out of its text"

    def looks_like_row(self, text: str, values: int, beside: str) -> bool:
        """Whether a text within quotes has as many values as a row has there.

        A separator with a space behind it rather belongs to prose, unless what precedes it looks like ``beside``, the
        first value of the row before.
        """
        first, _, rest = text.partition(self.separator)
        prose = rest.startswith(" ") and rest.strip() and (not beside or _shape(first) != _shape(beside))
        return text.count(self.separator) + 1 >= values and not prose


def _shape(name: str) -> str:
    """What names of clips have in common: 1782bea75c7d-7 and 17a-21 are 0-0, and both differ from a word."""
    return re.sub(r"[^\W_]+", lambda run: "0" if any(map(str.isdigit, run[0])) else "a", name.strip(' "'))


def _alike(values: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lines begin with names of clips, as numbered ones can be told from words."""
    shape = _shape(values[0])
    return shape == _shape(others[0]) and "0" in shape


def _delimited_records(lines: Lines, separator: str, path: Path, required: Sequence[str]) -> Records:
    number, line = next(lines)
    # With a quoted header, all is quoted (csv.QUOTE_ALL), with tabs as well.
    quotes = separator != "\t" or line.startswith('"')
    form = _Form(path, separator, quotes, line.count(separator) + 1)
    header = _values(number, line, lines, form)
    names = _names(header, number, path)
    form = replace(form, columns=len(names))
    reaches = max((names.index(name) + 1 for name in required if name in names), default=0)
    short: list[str] = []  # the line before, if it was
    beyond = None
    for number, line in lines:
        values = _values(number, line, lines, form)
        filled = max((index + 1 for index, value in enumerate(values) if value.strip()), default=0)
        if not filled:
            continue
        if sorted(value.strip() for value in values[:filled]) == sorted(names):
            raise UserError(f"{path}, line {number} is a header again: take it out, and keep the columns in one order")
        _check_place(values[:filled], names, number, form)
        # Separators at the end of all rows are a writer's habit, at the end of some they belong to the text.
        more = max(0, len(values) - len(header))
        if more != (beyond := more if beyond is None else beyond):
            raise UserError(
                f"{path}, line {number} ends in {more} separators beyond the last column, and other lines in {beyond}: "
                f"{form.remedy}, or take them off"
            )
        if not quotes and len(values) < len(header) and values[-1].count('"') % 2 and values[-1].startswith('"'):
            raise _broken(number, len(values), form)
        # A writer may leave out separators at the end of lines; a line end within a text looks much like it.
        if len(values) < reaches or (
            short and len(values) + len(short) == len(names) + 1 and not _alike(short, values)
        ):
            raise _broken(number, len(values), form)
        short = values if len(values) < len(names) else []
        yield number, dict(itertools.zip_longest(names, values[: len(names)], fillvalue=""))


def _check_place(values: Sequence[str], names: Sequence[str], number: int, form: _Form) -> None:
    """Refuse a value that stands in no column, as those do behind a separator within a text.

    Only the columns before the first name, as pandas writes its index, may hold what they like.
    """
    if len(values) > len(names):
        raise UserError(
            f"{form.path}, line {number} has {len(values)} values for {len(names)} columns: {form.remedy}, "
            "or name all columns in the header"
        )
    first_named = next((index for index, name in enumerate(names) if name), 0)
    for index in range(first_named, len(values)):
        if not names[index] and values[index].strip():
            raise UserError(
                f"{form.path}, line {number} has a value in column {index + 1}, which has no name: {form.remedy}, "
                "or name the column in the header"
            )


def _names(values: list[str], number: int, path: Path) -> list[str]:
    """The names of the columns without the nameless ones at the end, which spreadsheets leave."""
    names = [" ".join(value.split()) for value in values]
    while names and not names[-1]:
        names.pop()
    twice = next((name for index, name in enumerate(names) if name and name in names[:index]), None)
    if twice is not None:
        raise UserError(f"{path}, line {number} names a column twice: {twice[:40]}; rename one of them")
    return names


def _broken(number: int, values: int, form: _Form) -> UserError:
    remedy = "put texts that run over line ends in quotes" if form.quotes else "write each text on one line"
    return UserError(
        f"{form.path}, line {number} has {values} values for {form.columns} columns: {remedy}; "
        "where a value is empty, keep its separator"
    )


def _values(number: int, line: str, lines: Lines, form: _Form) -> list[str]:
    """The values of the record that begins with a line; quoted ones take more lines from ``lines``."""
    if '"' not in line:
        return line.split(form.separator)
    if not form.quotes:
        return [_unquoted_where_certain(value) for value in line.split(form.separator)]
    values: list[str] = []
    position = 0
    while True:
        opens = _SPACES.match(line, position).end()  # type: ignore[union-attr]  # none are a match, too
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
    number: int, line: str, opens: int, lines: Lines, before: Sequence[str], form: _Form
) -> tuple[str, str, int]:
    """A value in quotes, behind others of its record; the line on which it ends, and where there.

    Raises:
        UserError: it has no end, its end lies within a value, or it runs over what looks like rows of the table.
    """
    first, begins, last = line, opens + 1, number
    beside = before[0] if before else ""
    parts: list[str] = []
    length = 0
    while (rest := _REST_OF_QUOTED.match(line, begins)) is None:
        if last > number and form.looks_like_row(line, form.columns, beside):
            raise _open_quote(number, f"runs over line {last}, which looks like a row", form)
        parts.append(line[begins:])
        length += len(parts[-1]) + 1
        begins = 0
        last, line = next(lines, (0, ""))
        if not last or length > LONGEST_LINE:
            raise _open_quote(number, "is never closed", form)
    end = rest.end()
    filled_up = first.count(form.separator, opens) >= form.columns - len(before) - 1
    if parts and filled_up and form.looks_like_row(rest[1], len(before) + 1, beside):
        raise _open_quote(number, f"runs into line {last}, which looks like a row", form)
    if end < len(line) and line[end] != form.separator:
        stop = _end_of_value(line, end, form)
        # "Stop" he says: the quotes are part of the text, and there is no other way to read it.
        if parts or form.separator in rest[1] or line[end:stop].rstrip().endswith('"'):
            raise _open_quote(number, f"closes within a value (line {last})", form)
        return line[opens:stop], line, stop
    parts.append(rest[1])
    return "\n".join(parts).replace('""', '"'), line, end


def _open_quote(number: int, what: str, form: _Form) -> UserError:
    return UserError(
        f"{form.path}, line {number}: a quote that opens here {what}: close it at the end of its value, on the same "
        'line; quotes that are part of a text are doubled, and the text is quoted (say "hi" becomes "say ""hi""")'
    )


def _unquoted_where_certain(value: str) -> str:
    """A value of a table with tabs; spreadsheets double the quotes in it and quote it, which nobody does by hand."""
    quoted = _SPREADSHEETS_QUOTES.fullmatch(value.strip(" "))
    return quoted[1].replace('""', '"') if quoted and '""' in quoted[1] else value


def _json_records(lines: Lines, path: Path) -> Records:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a JSON object")
        yield number, record


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names '{next(name for name in names if names.count(name) > 1)[:40]}' twice")
    return record
