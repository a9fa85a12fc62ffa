"""List the members of a zip or tar in an amount of memory that its size bounds, whatever it claims."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import IO

# Bytes that a listed member, a folder in its name and a character of it take, here and in the index of names.
_PER_MEMBER, _PER_FOLDER, _PER_CHARACTER = 1600, 350, 30
_ALWAYS_ALLOWED = 150 << 20

_LONGEST_HEADER = 1 << 20  # of one member of a tar, with its long name and its pax records
_MOST_GLOBAL_RECORDS = 100  # pax records for all members, which tarfile copies to each of them

_ZIP_ENTRY, _ZIP_END, _ZIP64_LOCATOR = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x07"
_ZIP_ENTRY_SIZE = 46  # without its name
_ZIP64_END_SIZE, _ZIP64_LOCATOR_SIZE = 56, 20
_LONGEST_ZIP_END = 22 + (1 << 16)  # with its comment


class TooManyMembers(ValueError):
    """The list of an archive's members would take much more memory than the archive has bytes."""


def check_list(members: int, folders: int, characters: int, size: int) -> None:
    """Raise TooManyMembers if the names of an archive of ``size`` bytes would take too much memory."""
    cost = members * _PER_MEMBER + folders * _PER_FOLDER + characters * _PER_CHARACTER
    if cost > _ALWAYS_ALLOWED + 8 * size:
        raise TooManyMembers(
            f"its {size:,} bytes list more than {members - 1:,} members, whose names would take {cost >> 20:,} MiB"
        )


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """Open a zip after a look at its list of members, of which ``zipfile`` makes objects all at once.

    Raises:
        TooManyMembers, zipfile.BadZipFile, ValueError, NotImplementedError: it cannot be opened.
    """
    entries = _zip_entries(file)
    members = entries.count(_ZIP_ENTRY)
    check_list(members, entries.count(b"/"), len(entries) - members * _ZIP_ENTRY_SIZE, file.seek(0, io.SEEK_END))
    return zipfile.ZipFile(file)


def _zip_entries(file: IO[bytes]) -> bytes:
    """The central directory; empty where ``zipfile`` finds none either."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _LONGEST_ZIP_END - _ZIP64_END_SIZE - _ZIP64_LOCATOR_SIZE))
    start, tail = file.tell(), file.read()
    end = tail.rfind(_ZIP_END)
    if end < 0 or len(tail) < end + 22:
        return b""
    (length,) = struct.unpack_from("<I", tail, end + 12)
    locator = end - _ZIP64_LOCATOR_SIZE
    end64 = locator - _ZIP64_END_SIZE
    if end64 >= 0 and tail.startswith(_ZIP64_LOCATOR, locator):
        (length,) = struct.unpack_from("<Q", tail, end64 + 40)
        end = end64
    place = start + end - length
    if place < 0:
        return b""
    file.seek(place)
    return file.read(length)


def tar_members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar, each to be used before the next.

    Raises:
        tarfile.TarError, ValueError, RecursionError: it is damaged, also at a header in its middle.
    """
    file.seek(0)
    headers = _Headers(file)
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8") as archive:  # type: ignore[call-overload]
        while member := archive.next():
            if len(archive.pax_headers) > _MOST_GLOBAL_RECORDS:
                raise tarfile.ReadError(f"more than {_MOST_GLOBAL_RECORDS} global pax records")
            archive.members.clear()  # tarfile would keep all
            yield member
            headers.left = _LONGEST_HEADER
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset:,}")


class _Headers:
    """The file of a tar, of which a header is not read beyond its longest: ``tarfile`` allocates what it claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = _LONGEST_HEADER

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"a header of more than {_LONGEST_HEADER:,} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()
