"""Encodings, line ends and files that are not text."""

import gzip
import io
import shlex
import zipfile
from pathlib import Path

import pytest

from toolkit.corpus.table import read_table
from toolkit.corpus.table_lines import LONGEST_LINE, table_lines
from toolkit.errors import UserError


def _file(tmp_path, content: bytes, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_numbered_as_in_an_editor(tmp_path, encoding: str, end: str) -> None:
    path = _file(tmp_path, end.join(["é", "", "😀 \u2028 \x0b", "x"]).encode(encoding))
    assert list(table_lines(path)) == [(1, "é"), (2, ""), (3, "😀 \u2028 \x0b"), (4, "x")]


def _late(text: bytes) -> bytes:
    return b"uid,text\n" + b"".join(b"%d,red stone door\n" % number for number in range(2500)) + b"x," + text + b"\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("café", "WINDOWS-1252"),
        ("iPad™ in the œuvre", "WINDOWS-1252"),
        ("cœur don’t – Žižek", "WINDOWS-1252"),
        ("café für", "MACINTOSH"),
        ("Grüße", "MACINTOSH"),
        ("voilà", "MACINTOSH"),
    ],
)
def test_another_encoding_is_an_error_with_its_line_and_the_hint_works(tmp_path, text: str, encoding: str) -> None:
    path = _file(tmp_path, _late(text.encode(encoding)), "my table.csv")
    with pytest.raises(UserError, match=r"line 2502 .*UTF-8 .*byte 0x") as raised:
        read_table(path)
    command = shlex.split(raised.value.hint.rpartition("by ")[2])
    assert command == ["iconv", "-f", encoding, "-t", "UTF-8", str(path), ">", "NEW"]
    new = _file(tmp_path, path.read_bytes().decode(command[2]).encode(command[4]), "NEW")
    assert read_table(new)[-1].text == text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (_late("naïve ".encode() + b"caf\xe9"), "line 2502 .*UTF-8"),
        (_late(b"\x81"), "line 2502 .*UTF-8"),
        (_late(b"\xed\xa0\x80"), "line 2502 .*UTF-8"),
        (_late("नमस्ते".encode()[:-1]), "line 2502 .*UTF-8"),
        ("uid,text\na,b\n".encode("utf-16")[:-1], "line 2 .*UTF-16"),
        ("uid,text\na,b\n".encode("utf-16") + b"\x00\xd8a\x00", "line 3 .*UTF-16"),
        ("uid,text\na,b\n".encode("utf-16-le"), "line 1 .*NUL"),
        (b"uid,text\na,b\0c\n", "line 2 .*NUL"),
        (b"x" * (LONGEST_LINE + 1), "line 1 .*1,048,576"),
        (gzip.compress(b"uid,text\n", mtime=0), "compressed"),
        (b"PAR1" + bytes(8), "Parquet"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "spreadsheet"),
    ],
)
def test_a_file_that_is_not_utf_8_is_an_error_with_its_line(tmp_path, content: bytes, named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        read_table(_file(tmp_path, content))
    assert "table.csv" in raised.value.message and raised.value.hint


def test_a_spreadsheet_is_recognised(tmp_path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    with pytest.raises(UserError, match=r"spreadsheet.* zip"):
        read_table(_file(tmp_path, content.getvalue()))
