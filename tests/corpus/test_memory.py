"""No table and no archive costs more than 10 times its uncompressed size + 200 MiB to read, whatever it claims."""

from __future__ import annotations

import bz2
import contextlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.peak_memory import SLACK, growth, over_limit
from toolkit.corpus import table
from toolkit.corpus.archives.files import open_poses
from toolkit.corpus.table import read_table
from toolkit.errors import UserError
from toolkit.poses.pose_file import PoseError

pytestmark = pytest.mark.process

HEADER = "uid,text\n"
END = bytes(1024)  # of a tar


@cache
def _tables() -> dict[str, bytes]:
    """Tables whose lines do not end or hold many values."""
    columns = [f"c{number}" for number in range(100_000)]
    objects = ",".join(f'"{column}":0' for column in columns[:60_000])
    tables = {
        "one line.csv": HEADER + "a," * 5_000_000,
        "a quote.csv": HEADER + '1,"' + "a\n" * 600_000,
        "many columns.csv": f"uid,text,{','.join(columns)}\n" + "1,a\n" * 20,
        "a column twice.csv": f"uid,text,{','.join(columns)},{columns[-1]}\n",
        "lists.jsonl": json.dumps({"uid": "1", "text": "a", "lists": [[]] * 200_000}) + "\n",
        "lists in lists.jsonl": "[" * 1_000_000,
        "keys.jsonl": '{"uid":"1","text":"a",' + objects + "}\n",
        "a key twice.jsonl": "{" + objects + ',"c59999":0}',
        "a large number.jsonl": '{"uid":"1","text":' + "9" * 1_000_000 + "}\n",
    }
    return {name: text.encode() for name, text in tables.items()} | {"zeros.csv": bytes(10_000_000)}


def _long_tables() -> dict[str, bytes]:
    """Tables of few bytes a row, or a character."""
    wide = "\U0001f44b" + "a" * 99_990  # one character that needs four bytes makes all others need them
    tables = {
        "short rows.csv": HEADER + "12,a\n" * 2_000_000,
        "rows without a uid.csv": HEADER + ",a\n" * 2_000_000,
        "numbered rows.csv": HEADER + "".join(f"{number},ab\n" for number in range(1_200_000)),
        "rows of 32 bytes.csv": HEADER + "".join(f"{number:012},red stone door tod\n" for number in range(700_000)),
        "short objects.jsonl": '{"uid":1,"text":"a"}\n' * 1_000_000,
        "wide characters.csv": HEADER + "".join(f"{number},{wide}\n" for number in range(100)),
        "empty lines.csv": HEADER + "\n" * 3_000_000,
    }
    return {name: text.encode() for name, text in tables.items()} | {
        "UTF-32.csv": (HEADER + "1,hello\n" * 100_000).encode("utf-32"),
    }


def _zip(
    members: Mapping[str, bytes],
    *,
    method: int = 8,
    claimed: int | None = None,
    compressed: int | None = None,
    with_content: bool = True,
) -> bytes:
    """A zip of compressed contents by name.

    ``claimed`` and ``compressed`` are sizes to write instead of the right ones; without ``with_content`` all members
    have the content of the first.
    """
    file, directory = io.BytesIO(), io.BytesIO()
    place = 0
    for number, (name, content) in enumerate(members.items()):
        encoded = name.encode()
        fields = (20, 0x800, method, 0, 0, 0, len(content) if compressed is None else compressed, claimed or 0)
        if number == 0 or with_content:
            place = file.tell()
            file.write(b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", *fields, len(encoded), 0) + encoded + content)
        directory.write(b"PK\x01\x02" + struct.pack("<HHHHHHIIIHH", 20, *fields, len(encoded), 0))
        directory.write(struct.pack("<HHHII", 0, 0, 0, 0, place) + encoded)
    count = min(len(members), 0xFFFF)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, directory.tell(), file.tell(), 0)
    return file.getvalue() + directory.getvalue() + b"PK\x05\x06" + end


def _deflated(content: bytes) -> bytes:
    packed = zlib.compressobj(wbits=-15)
    return packed.compress(content) + packed.flush()


def _block(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of a tar."""
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header.tobuf(tarfile.GNU_FORMAT)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


@cache
def _archives() -> dict[str, bytes]:
    """Archives of few bytes that unpack to more than they claim, or claim more than they hold."""
    zeros = bytes(100 << 20)
    deflated = _deflated(bytes(400 << 20))
    pax = b"".join(b"%d %06d=b\n" % (12, number) for number in range(80_000))
    record = _block("x", 12, tarfile.XHDTYPE) + _padded(b"12 000000=b\n")
    return {
        "deflated.zip": _zip({"0.npy": deflated}, claimed=100),
        "deflated 2 GiB.zip": _zip({"0.npy": deflated}, claimed=2 << 30),
        "bzip2.zip": _zip({"0.npy": bz2.compress(zeros)}, method=zipfile.ZIP_BZIP2, claimed=100),
        "lzma.zip": _zip({"0.npy": bytes(100)}, method=zipfile.ZIP_LZMA, claimed=100),
        "stored.zip": _zip({"0.npy": b"abc"}, method=zipfile.ZIP_STORED, compressed=3 << 30, claimed=1 << 29),
        "a long name.tar": _block("L", 3 << 30, tarfile.GNUTYPE_LONGNAME) + _block("0.npy", 0) + END,
        "a pax header.tar": _block("x", 3 << 30, tarfile.XHDTYPE) + _block("0.npy", 0) + END,
        "pax records for all.tar": _block("g", len(pax), tarfile.XGLTYPE)
        + _padded(pax)
        + b"".join(record + _block(f"{number}.npy", 0) for number in range(100))
        + END,
        "headers of headers.tar": record * 5_000 + END,
        "a member.tar": _block("0.npy", 3 << 30) + b"abc",
    }


def _long_archives() -> dict[str, bytes]:
    """Archives that list many members, or members with long names."""
    folders = "".join(f"{number}/" for number in range(10_000))
    of_their_own = ("".join(f"{number}x{other}/" for other in range(30)) for number in range(30_000))
    wide = "\U0001f44b" + "a" * 60_000
    return {
        "many members.zip": _zip({f"{number}.npy": b"" for number in range(200_000)}, with_content=False),
        "many other members.zip": _zip({str(number): b"" for number in range(200_000)}, with_content=False),
        "long names.zip": _zip({f"{wide}{number}.npy": b"" for number in range(400)}),
        "deep names.zip": _zip({f"{folders}{number}.npy": b"" for number in range(100)}),
        "folders of their own.zip": _zip({f"{folders}0.npy": b"" for folders in of_their_own}),
        "many members.tar": b"".join(_block(f"{number}.npy", 0) for number in range(60_000)) + END,
        "long names.tar": b"".join(
            _block("L", len(name), tarfile.GNUTYPE_LONGNAME) + _padded(name) + _block("0.npy", 0)
            for name in (f"{wide}{number}.npy".encode() for number in range(400))
        )
        + END,
    }


def _damaged(seeds: Mapping[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    """Archives and tables with bytes overwritten by large numbers, or truncated."""
    random = np.random.default_rng(0)
    patches = [
        b"\xff\xff",
        b"\xff\xff\xff\x7f",
        b"77777777777",
        b"\x80" + b"\xff" * 11,
        b'"',
        b"\0",
        b"PK\x05\x06",
        b"{",
    ]
    names = sorted(seeds)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(seeds[name])
        for _ in range(int(random.integers(1, 4))):
            place = int(random.integers(len(content) + 1))
            patch = patches[int(random.integers(len(patches)))]
            content[place : place + len(patch)] = patch
        if random.random() < 0.2:
            del content[int(random.integers(len(content))) :]
        kind, _, suffix = name.rpartition(".")
        yield f"{kind} {number}.{suffix}", bytes(content)


def _seeds() -> dict[str, bytes]:
    content = bytes(range(256)) * 8
    members = {f"poses/{number}.npy": content for number in range(3)}
    tar = b"".join(_block(name, len(content)) + _padded(content) for name, content in members.items())
    long_name = _block("L", 600, tarfile.GNUTYPE_LONGNAME) + _padded(b"a" * 595 + b".npy")
    record = _block("x", 12, tarfile.XHDTYPE) + _padded(b"12 000000=b\n")
    return {
        "deflated.zip": _zip({name: _deflated(content) for name, content in members.items()}, claimed=len(content)),
        "stored.zip": _zip(members, method=zipfile.ZIP_STORED, claimed=len(content)),
        "plain.tar": tar + END,
        "headers.tar": long_name + _block("0.npy", 0) + record + tar + END,
        "table.csv": (HEADER + '1,a\n2,"a ""b"" c"\n' * 20).encode(),
        "table.tsv": (HEADER + "1,a\n" * 20).replace(",", "\t").encode("utf-16"),
        "table.jsonl": b'{"uid":"1","text":"a"}\n' * 20,
    }


def _write(folder: Path, contents: Mapping[str, bytes]) -> dict[str, tuple[Path, int]]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, len(content)) for name, content in contents.items()}


def _check(reader: str, folder: Path, contents: Mapping[str, bytes]) -> None:
    assert over_limit(reader, _write(folder, contents)) == {}


def test_tables_of_long_lines(tmp_path: Path) -> None:
    _check("table", tmp_path, _tables())


def test_archives_that_do_not_hold_what_they_claim(tmp_path: Path) -> None:
    _check("archive", tmp_path, _archives())


@pytest.mark.nightly
def test_tables_of_many_rows(tmp_path: Path) -> None:
    _check("table", tmp_path, _long_tables())


@pytest.mark.nightly
def test_archives_of_many_members(tmp_path: Path) -> None:
    _check("archive", tmp_path, _long_archives())


@pytest.mark.nightly
def test_damaged_tables_and_archives(tmp_path: Path) -> None:
    damaged = list(_damaged(_seeds(), 20_000))
    for start in range(0, len(damaged), 500):
        part = dict(damaged[start : start + 500])
        archives = {name: content for name, content in part.items() if name.endswith((".zip", ".tar"))}
        _check("archive", tmp_path, archives)
        _check("table", tmp_path, {name: content for name, content in part.items() if name not in archives})


def _read_whole(path: Path) -> None:
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        archive.read("0.npy")


def test_a_reader_that_decompresses_more_than_a_zip_claims_is_measured(tmp_path: Path) -> None:
    content = _archives()["deflated.zip"]
    path = tmp_path / "0.zip"
    path.write_bytes(content)
    assert growth(lambda: _read_whole(path)) > 10 * len(content) + SLACK


def test_what_is_refused_and_why(tmp_path: Path) -> None:
    files = _write(tmp_path, _tables() | _archives())
    with pytest.raises(UserError, match="columns"):
        read_table(files["many columns.csv"][0])
    for name in ("a long name.tar", "a pax header.tar", "pax records for all.tar", "headers of headers.tar"):
        with pytest.raises(UserError, match="damaged"):
            open_poses(files[name][0])
    reasons = {"deflated": "CRC", "deflated 2 GiB": "GiB", "bzip2": "deflate", "lzma": "deflate"}
    for name, reason in reasons.items():
        poses = open_poses(files[f"{name}.zip"][0])
        with pytest.raises(PoseError, match=reason):
            poses.read(poses.files["0.npy"])


def test_a_list_of_members_that_is_large_beside_its_archive(tmp_path: Path) -> None:
    """Unpacked, the same poses are read."""
    (tmp_path / "p.zip").write_bytes(_zip({f"{number}.npy": b"" for number in range(120_000)}, with_content=False))
    with pytest.raises(UserError, match="members") as raised:
        open_poses(tmp_path / "p.zip")
    assert "unpack" in raised.value.hint


def test_a_table_of_very_short_rows(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table, "MOST_SHORT_ROWS", 50)
    short, longer = tmp_path / "short.csv", tmp_path / "longer.csv"
    short.write_text(HEADER + "1,a\n" * 60)
    longer.write_text(HEADER + "1,a sentence of some words is here\n" * 60)
    with pytest.raises(UserError, match="more than 50 rows"):
        read_table(short)
    assert len(read_table(longer)) == 60
