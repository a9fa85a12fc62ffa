"""Read the lines of a table: its encoding, its line ends, and errors for files that are not text."""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import UserError

LONGEST_LINE = 1 << 20
"""Characters; a longer line means that the file is not a table."""

NumberedLines = Iterator[tuple[int, str]]
"""Line numbers, from 1, and lines without their ends."""

# UTF-32 comes first: its mark begins with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF8: "UTF-8-sig",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_AS_JSONL = "write its records as JSONL: one object with uid and text a line"
_LONGEST_MAGIC = 32
_NO_TEXT = {
    b"PK\x03\x04": ("a spreadsheet or a zip", "save its sheet as 'CSV UTF-8'"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", "save its sheet as 'CSV UTF-8'"),
    b"\x1f\x8b": ("compressed", "decompress it with gunzip"),
    b"PAR1": ("a Parquet file", "convert it with pandas.read_parquet(…).to_csv(…, index=False)"),
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"), ("a web page", "download the table itself")),
    b"version https://git-lfs": ("a pointer of Git LFS, not the table itself", "download it by git lfs pull"),
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), ("a pickle", _AS_JSONL)),
    **dict.fromkeys((b"\x93NUMPY", b"\x89HDF", b"SQLite format 3", b"ARROW1"), ("no text", _AS_JSONL)),
}
_AS_SURROGATE = "toolkit.as_surrogate"
_SYMBOLS_OF_1252 = b"\x86\x87\x88\x89\x8b\x98\x9b"  # that do not follow a letter
_SURROGATE = re.compile("[\ud800-\udfff]")


def _as_surrogate(error: UnicodeError) -> tuple[str, int]:
    """Decode an invalid byte as a surrogate, which no valid text contains, so that its line can be named."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(_AS_SURROGATE, _as_surrogate)


def table_lines(path: Path) -> NumberedLines:
    r"""The lines of a text file in UTF-8, or as its byte order mark says; they end in ``\n``, ``\r\n`` or ``\r``.

    Raises:
        UserError: the file is not text, or a line has bytes of another encoding, a NUL character or no end.
    """
    with open(path, "rb") as binary:
        beginning = binary.read(_LONGEST_MAGIC)
    for magic, (kind, remedy) in _NO_TEXT.items():
        if beginning.startswith(magic):
            raise UserError(f"{path} is {kind}", remedy)
    encoding = next((name for mark, name in _ENCODINGS.items() if beginning.startswith(mark)), "UTF-8")
    all_ascii = True
    with open(path, encoding=encoding, errors=_AS_SURROGATE) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{path}, line {number} is longer than {LONGEST_LINE:,} characters",
                    "check data.table (--table): a CSV, TSV or JSONL file",
                )
            if "\0" in line:
                raise UserError(
                    f"{path}, line {number} holds a NUL character",
                    "check data.table (--table): a text file in UTF-8" if number == 1 else "remove it",
                )
            if not line.isascii():
                if invalid := _SURROGATE.search(line):
                    ascii_before = all_ascii and line[: invalid.start()].isascii()
                    raise _not_decodable(path, number, line, invalid.start(), encoding, ascii_before)
                all_ascii = False
                # A table that was joined from several has byte order marks in the middle.
                line = line.lstrip("\ufeff")
            yield number, line.removesuffix("\n")


def _not_decodable(path: Path, number: int, line: str, at: int, encoding: str, all_ascii_before: bool) -> UserError:
    byte = ord(line[at]) - 0xDC00
    where = f"{path}, line {number} is not {encoding.removesuffix('-sig')} text (byte 0x{byte:02X}"
    where += f" after {line[max(0, at - 20) : at]!r})" if at else ")"
    if encoding != "UTF-8" or not all_ascii_before:
        return UserError(f"{where}, but the lines before are", "correct this line")
    if _decodes(path, "cp1252"):
        origin, name = ("a Mac", "MACINTOSH") if _is_of_mac(byte, line[:at]) else ("Windows or Excel", "WINDOWS-1252")
        command = f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > NEW"
        return UserError(where, f"save it as UTF-8; a table from {origin} in Western languages by {command}")
    return UserError(where, "save it as UTF-8 with the program that wrote it")


def _is_of_mac(byte: int, before: str) -> bool:
    """Whether a byte is a letter in Mac OS Roman; in code page 1252 it would be a capital or a symbol within a word."""
    in_1252 = bytes([byte]).decode("cp1252", "replace")
    return byte < 0xA0 and before[-1:].islower() and (in_1252.isupper() or byte in _SYMBOLS_OF_1252)


def _decodes(path: Path, encoding: str) -> bool:
    with open(path, encoding=encoding) as file:
        try:
            while file.read(LONGEST_LINE):
                pass
        except UnicodeDecodeError:
            return False
    return True
