"""The lines of a table's file: in which encoding they are, where they end, and which files are no text at all.

Lines are read one by one, none further than the longest that makes sense, so that a binary file costs no memory.
"""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import UserError

LONGEST_LINE = 1 << 20
"""Characters; no sentence is that long, but a binary file that was given by mistake may be."""

Lines = Iterator[tuple[int, str]]
"""Numbers, counted from 1 as an editor does, and lines without their ends."""

# UTF-32 comes first: its mark begins with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF8: "UTF-8-sig",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_NO_TEXT = {
    b"PK\x03\x04": "a spreadsheet or a zip: save its sheet as 'CSV UTF-8'",
    b"\xd0\xcf\x11\xe0": "a spreadsheet: save its sheet as 'CSV UTF-8'",
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"PAR1": "a Parquet file: write it with pandas.read_parquet(…).to_csv(…, index=False)",
}
_FAULT = "toolkit.fault"
_FAULTY = re.compile("[\ud800-\udfff]")


def _as_surrogate(error: UnicodeError) -> tuple[str, int]:
    """Decode what cannot be decoded as a surrogate, which no sound text holds, so that its line can be named."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(_FAULT, _as_surrogate)


def table_lines(path: Path) -> Lines:
    r"""The lines of a text file; UTF-8, or what its byte order mark says; they end in ``\n``, ``\r\n`` or ``\r``.

    Raises:
        UserError: the file is no text, or a line has bytes of another encoding, a NUL character or no end.
    """
    with open(path, "rb") as binary:
        beginning = binary.read(4)
    for magic, what in _NO_TEXT.items():
        if beginning.startswith(magic):
            raise UserError(f"{path} is {what}")
    encoding = next((name for mark, name in _ENCODINGS.items() if beginning.startswith(mark)), "UTF-8")
    all_ascii = True
    with open(path, encoding=encoding, errors=_FAULT) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE:,} characters: is this a table?")
            if "\0" in line:
                raise UserError(f"{path}, line {number} holds a NUL character: save it as UTF-8 text, or take it out")
            if not line.isascii():
                if fault := _FAULTY.search(line):
                    sound = all_ascii and line[: fault.start()].isascii()
                    raise _not_decodable(path, number, line, fault.start(), encoding, sound)
                all_ascii = False
                # Tables that were joined carry a mark at each seam.
                line = line.lstrip("\ufeff")
            yield number, line.removesuffix("\n")


def _not_decodable(path: Path, number: int, line: str, at: int, encoding: str, all_ascii_before: bool) -> UserError:
    byte = ord(line[at]) - 0xDC00
    where = f"{path}, line {number} is not {encoding.removesuffix('-sig')} text (byte 0x{byte:02X}"
    where += f" after {line[max(0, at - 20) : at]!r})" if at else ")"
    if encoding != "UTF-8" or not all_ascii_before:
        return UserError(f"{where}, although what is before it is: mend this line")
    if _decodes(path, "cp1252"):
        command = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > NEW"
        return UserError(f"{where}: save it as UTF-8; if it comes from Western Windows or Excel, by {command}")
    return UserError(f"{where}: save it as UTF-8 where it was made")


def _decodes(path: Path, encoding: str) -> bool:
    with open(path, encoding=encoding) as file:
        try:
            while file.read(LONGEST_LINE):
                pass
        except UnicodeDecodeError:
            return False
    return True
