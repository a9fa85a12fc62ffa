"""Encodings, line ends and files that are no text."""

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


def test_another_encoding_is_told_with_its_line_and_the_remedy_works(tmp_path) -> None:
    path = _file(tmp_path, _late("café".encode("cp1252")), "my table.csv")
    with pytest.raises(UserError, match=r"line 2502 is not UTF-8 text \(byte 0xE9 after 'x,caf'\)") as raised:
        read_table(path)
    command = shlex.split(str(raised.value).rpartition("by ")[2])
    assert command == ["iconv", "-f", "WINDOWS-1252", "-t", "UTF-8", str(path), ">", "NEW"]
    new = _file(tmp_path, path.read_bytes().decode(command[2]).encode(command[4]), "NEW")
    assert read_table(new)[-1].text == "café"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (_late("naïve ".encode() + b"caf\xe9"), "line 2502 .* although what is before it is: mend this line"),
        (_late(b"\x81"), "line 2502 .*: save it as UTF-8 where it was made"),
        (_late(b"\xed\xa0\x80"), "line 2502 is not UTF-8"),
        (_late("नमस्ते".encode()[:-1]), "line 2502 is not UTF-8"),
        ("uid,text\na,b\n".encode("utf-16")[:-1], "line 2 is not UTF-16"),
        ("uid,text\na,b\n".encode("utf-16") + b"\x00\xd8a\x00", "line 3 is not UTF-16"),
        ("uid,text\na,b\n".encode("utf-16-le"), "line 1 holds a NUL character: save it as UTF-8"),
        (b"uid,text\na,b\0c\n", "line 2 holds a NUL character"),
        (b"x" * (LONGEST_LINE + 1), "line 1 is longer than"),
        (gzip.compress(b"uid,text\n"), "is compressed: unpack it with gunzip"),
        (b"PAR1" + bytes(8), "is a Parquet file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a spreadsheet: save its sheet as 'CSV UTF-8'"),
    ],
)
def test_what_is_no_utf_8_is_one_line(tmp_path, content: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        read_table(_file(tmp_path, content))
    assert "table.csv" in str(raised.value) and "\n" not in str(raised.value)


def test_a_spreadsheet_is_told(tmp_path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    with pytest.raises(UserError, match="is a spreadsheet or a zip: save its sheet as 'CSV UTF-8'"):
        read_table(_file(tmp_path, content.getvalue()))
