"""Where the pose files lie, and how the one that belongs to a row of the table is found and read.

A folder, a zip, a tar, or either of these cut into parts, as large corpora are published. Archives are read in place:
no part is joined with another and nothing is unpacked. A name inside an archive is only ever looked up, so it cannot
lead anywhere.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

from toolkit.corpus.names import SUFFIXES, Names, is_pose_file, shown
from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.poses.pose_file import PoseError
from toolkit.poses.zip_entries import read_entry

LARGEST_FILE = 1 << 30
"""Bytes of one pose file; an hour of full holistic poses is 850 MB."""

# x.zip.part_aa, x.zip.part-1, x.zip.001
_PARTS = (
    re.compile(r"(?P<stem>.+\.part[_-]?)(?P<number>[a-z]{2,3}|\d+)"),
    re.compile(r"(?P<stem>.+\.)(?P<number>\d{3})"),
)


class _Container(Protocol):
    """A place whose entries are read by a key that ``entries`` gave."""

    def entries(self) -> Iterable[tuple[str, Any, object]]:
        """Name, key and whatever changes when the content does, of each pose file."""

    def read(self, key: Any) -> bytes: ...


@dataclass(frozen=True)
class PoseFiles:
    """The pose files of a corpus, wherever they lie.

    Attributes:
        container: reads a file by its key.
        files: key of each file, by its name: the path that leads there.
        names: finds a file by what a table calls it.
        identity: hash of all names, sizes and times of change or checksums.
    """

    container: _Container
    files: dict[str, Any]
    names: Names
    identity: str

    def match(self, row: Row) -> tuple[str, list[str]]:
        """The files that may hold a row's clip.

        Returns:
            the name that was looked up, and the files that it may mean: one, or none, or several if it is ambiguous.
        """
        found = [(name, self.names.match(name)) for _, name in _looked_up(row)]
        unique = (match for match in found if len(match[1]) == 1)
        ambiguous = (match for match in found if match[1])
        return next(unique, None) or next(ambiguous, None) or found[0]

    def find(self, row: Row) -> Any | None:
        """The key of the file that holds a row's clip, None if there is none or its name is ambiguous."""
        _, files = self.match(row)
        return self.files[files[0]] if len(files) == 1 else None

    def why_not(self, row: Row) -> str:
        """Why ``find`` finds nothing, and what would help."""
        name, files = self.match(row)
        if files:
            return (
                f"several pose files have its name: '{shown(name)}' may be {' or '.join(map(shown, files))}: "
                "write the one that is meant as the uid or into a column pose"
            )
        names = " and ".join(f"'{shown(name)}' ({column})" for column, name in _looked_up(row))
        return (
            f"no pose file has its name: looked up {names}, the nearest is {shown(self.names.nearest(name))}: "
            "if that is the one, write it into a column pose"
        )

    def read(self, key: Any) -> bytes:
        """The bytes of a file that ``find`` named.

        Raises:
            PoseError: it cannot be read.
        """
        try:
            return self.container.read(key)
        except OSError as error:
            raise PoseError(f"the file cannot be read: {error.strerror or error}") from error


def open_poses(path: Path) -> PoseFiles:
    """Look through a place with pose files.

    Args:
        path: a folder, a zip, a tar, or any one of the parts (``x.zip.part_aa``, ``x.zip.001``) of a zip or tar.

    Raises:
        UserError: it is not there, is none of these, or holds no pose file.
    """
    try:
        container: _Container = _Folder(path) if path.is_dir() else _open_archive(path)
        entries = sorted(container.entries(), key=lambda entry: entry[0])
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}): is data.poses right?") from error
    if not entries:
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file: is data.poses right?")
    digest = xxhash.xxh3_64()
    last: dict[str, tuple[str, Any]] = {}
    for name, key, mark in entries:
        # Who unpacks an archive that holds a name twice (tar -r) has the later one.
        last[posixpath.normpath(name)] = name, key
        digest.update(repr((name, mark)).encode())
    files = dict(last.values())
    return PoseFiles(container, files, Names(files, str(path.absolute())), digest.hexdigest())


def _looked_up(row: Row) -> list[tuple[str, str]]:
    """Column and value of each name that a row's pose file may have."""
    if row.pose:
        return [("pose", row.pose)]
    cut = row.start is not None or row.end is not None
    return [("uid", row.uid)] + ([("video", row.video)] if cut and row.video else [])


class _Folder:
    """A folder, flat or nested; the key of a file is its path, which holds in every process of a cluster."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def entries(self) -> Iterator[tuple[str, str, object]]:
        return self._walk(str(self.path), "", frozenset())

    def _walk(self, folder: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, str, object]]:
        above |= {os.path.realpath(folder)}
        with os.scandir(folder) as found:
            for entry in found:
                if entry.is_dir():
                    # A link to a folder above would lead around in circles.
                    if not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                        yield from self._walk(entry.path, f"{prefix}{entry.name}/", above)
                elif is_pose_file(entry.name) and entry.is_file():
                    status = entry.stat()
                    yield prefix + entry.name, entry.path, (status.st_size, status.st_mtime_ns)

    def read(self, key: str) -> bytes:
        with open(key, "rb") as file:
            _refuse_too_large(os.fstat(file.fileno()).st_size)
            return file.read()


def _open_archive(path: Path) -> _Container:
    joined = _JoinedParts(_parts_of(path))
    buffered: IO[bytes] = _BoundedReader(joined)
    try:
        if zipfile.is_zipfile(buffered):
            return _Zip(path.absolute(), buffered)
        if joined.pread(257, 5) == b"ustar":
            return _Tar(path.absolute(), buffered, joined)
    except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError) as error:
        raise UserError(f"{path} is a damaged archive: {error}") from error
    if joined.pread(0, 2) == b"\x1f\x8b":
        raise UserError(f"{path} is gzip-compressed and cannot be read in place: unpack it, or pack the poses as a zip")
    among = f" (its {len(joined.paths)} parts were read as one: is the last missing?)" if len(joined.paths) > 1 else ""
    raise UserError(f"{path} is neither a folder nor a zip or tar{among}: is data.poses right?")


def _parts_of(path: Path) -> list[Path]:
    """The file itself, or all the parts that it is one of, or that together would be it.

    Raises:
        UserError: there is no such file, or a part is missing.
    """
    match = _as_part(path.name)
    if path.is_file() and not match:
        return [path]
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: is data.poses right?")
    parts: dict[int, Path] = {}
    for sibling in path.parent.iterdir():
        part = _as_part(sibling.name)
        if part and sibling.is_file() and (part[0] == match[0] if match else part[0].startswith(path.name + ".")):
            parts[part[1]] = sibling
    if not parts:
        raise UserError(f"there is no folder or archive {path}: data.poses wants the place of the .pose files")
    first = 0 if 0 in parts else 1
    if sorted(parts) != list(range(first, first + len(parts))):
        missing = next(number for number in range(first, max(parts)) if number not in parts)
        raise UserError(f"{path}: {len(parts)} parts are there, but number {missing - first + 1} is missing")
    return [parts[number] for number in sorted(parts)]


def _as_part(name: str) -> tuple[str, int] | None:
    """What the parts of one file have in common and the number of this one (``aa`` is 0); None for other files."""
    match = next(filter(None, (pattern.fullmatch(name) for pattern in _PARTS)), None)
    if match is None:
        return None
    number = 0
    for letter in match["number"]:
        number = number * 10 + int(letter) if letter.isdigit() else number * 26 + ord(letter) - ord("a")
    return match["stem"], number


class _JoinedParts(io.RawIOBase):
    """Several files read as if they were one.

    Every read names its offset to the system, so processes forked from this one do not move each other's place.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._files = [os.open(path, os.O_RDONLY) for path in paths]
        self._ends = [0]
        for file in self._files:
            self._ends.append(self._ends[-1] + os.fstat(file).st_size)
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return self._ends[-1]

    def pread(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on; fewer only at the end."""
        pieces = []
        while size > 0 and offset < self._ends[-1]:
            part = bisect.bisect_right(self._ends, offset) - 1
            piece = os.pread(self._files[part], min(size, self._ends[part + 1] - offset), offset - self._ends[part])
            if not piece:
                raise OSError("the archive became shorter while it was read")
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        content = self.pread(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        if start + offset < 0:
            raise OSError("seek before the beginning of the archive")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            for file in self._files:
                os.close(file)
        super().close()


class _BoundedReader(io.BufferedReader):
    """Never asks for more bytes than there are.

    The directory of a damaged archive may claim gigabytes, and a read allocates what it asks for before it looks.
    """

    def __init__(self, joined: _JoinedParts) -> None:
        super().__init__(joined)
        self._size = joined.size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


class _Zip:
    """A zip; the key of a file is its entry in the central directory."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_archive, (self._path,)  # another machine of a cluster opens it itself

    def entries(self) -> Iterator[tuple[str, zipfile.ZipInfo, object]]:
        for entry in self._archive.infolist():
            name = _zip_name(entry)
            if is_pose_file(name):
                yield name, entry, (entry.file_size, entry.CRC)

    def read(self, key: zipfile.ZipInfo) -> bytes:
        _refuse_too_large(key.file_size)
        return read_entry(self._archive, key)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The name of a member; macOS writes UTF-8 without saying so, which is then taken for the code page of DOS."""
    if not entry.flag_bits & 0x800 and not entry.filename.isascii():
        with contextlib.suppress(UnicodeError):
            return entry.filename.encode("cp437").decode("utf-8")
    return entry.filename


class _Tar:
    """An uncompressed tar; the key of a file is where its bytes begin and how many they are."""

    def __init__(self, path: Path, file: IO[bytes], joined: _JoinedParts) -> None:
        self._path = path
        self._file, self._joined = file, joined  # the buffered file would close the other with itself
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            self._members: list[tuple[str, tuple[int, int], object]] = [
                (member.name, (member.offset_data, member.size), (member.size, member.mtime))
                for member in archive
                if member.isreg() and not member.issparse() and is_pose_file(member.name)
            ]

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_archive, (self._path,)

    def entries(self) -> list[tuple[str, tuple[int, int], object]]:
        return self._members

    def read(self, key: tuple[int, int]) -> bytes:
        offset, size = key
        _refuse_too_large(size)
        content = self._joined.pread(offset, size)
        if len(content) < size:
            raise PoseError("the tar ends within the file")
        return content


def _refuse_too_large(size: int) -> None:
    if size > LARGEST_FILE:
        raise PoseError(f"the file is larger than {LARGEST_FILE >> 30} GiB")
