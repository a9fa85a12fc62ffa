"""Find and read the pose file and the feature file of each row of the table.

The files of a kind are in a folder, a zip or a tar; large corpora publish a zip or tar as a sequence of parts. Archives
are read in place: parts are not joined and nothing is unpacked.
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
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import xxhash

from toolkit.corpus.archives.members import TooManyMembers, check_list, open_zip, tar_members
from toolkit.corpus.names import FEATURE_SUFFIXES, SUFFIXES, Names, escaped, is_pose_file
from toolkit.errors import UserError
from toolkit.poses.compressed import read_member
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from toolkit.corpus.table import Row  # what reads tables takes long to import

_CHECK_PATH = "check data.poses (--poses): the folder or archive of the pose files"
_CHECK_FEATURES = f"check data.features (--features): the folder or archive of {', '.join(FEATURE_SUFFIXES)} files"
# What a folder or archive holds instead of poses, by suffix, and the remedy.
_INSTEAD = {
    ".json": "convert the JSON files of each clip by pose_format.utils.openpose.load_openpose_directory (pip install "
    "pose-format)",
    **dict.fromkeys(
        VIDEO_SUFFIXES,
        "estimate poses first: pip install 'pose-format[mediapipe]', then videos_to_poses --format mediapipe "
        "--directory FOLDER",
    ),
    **dict.fromkeys(
        (".zip", ".tar", ".gz"), "unpack these archives into one folder, and give that as data.poses (--poses)"
    ),
}
# x.zip.part_aa, x.zip.part-1, x.zip.001
_PARTS = (
    re.compile(r"(?P<stem>.+\.part[_-]?)(?P<number>[a-z]{2,3}|\d+)"),
    re.compile(r"(?P<stem>.+\.)(?P<number>\d{3})"),
)


class _Container(Protocol):
    """A folder or archive whose pose files are read by the keys that ``entries`` gives."""

    def entries(self) -> Iterable[tuple[str, Any, object]]:
        """Name, key and version (a value that changes with the content) of each pose file."""

    def others(self) -> Iterable[str]:
        """The names of all its files, for a message where none is a pose file."""

    def read(self, key: Any) -> bytes: ...


@dataclass(frozen=True)
class PoseFiles:
    """The pose files of a corpus in a folder or archive."""

    container: _Container  # reads a file by its key
    files: dict[str, Any]  # the key of each file by its name, which is its path in the container
    names: Names  # finds a file by what a table calls it
    identity: str  # hash of the names and versions of all files
    kind: str = "pose"  # or features: the column of a table that names a file, and what messages call it

    def match(self, row: Row) -> tuple[str, list[str]]:
        """Look up a row's clip.

        Returns:
            the name that was looked up, and the files that match: one, none, or several if the name is ambiguous.
        """
        found = [(name, self.names.match(name)) for _, name in self._looked_up(row)]
        unique = (match for match in found if len(match[1]) == 1)
        ambiguous = (match for match in found if match[1])
        return next(unique, None) or next(ambiguous, None) or found[0]

    def find(self, row: Row) -> Any | None:
        """The key of the file with a row's clip, None if there is no such file or its name is ambiguous."""
        _, files = self.match(row)
        return self.files[files[0]] if len(files) == 1 else None

    def reason_not_found(self, row: Row) -> tuple[str, str]:
        """Why ``find`` finds no file, and the remedy."""
        name, files = self.match(row)
        if files:
            return (
                f"several {self.kind} files have its name: '{escaped(name)}' may be {' or '.join(map(escaped, files))}",
                f"write the path of the right one as the uid or into a column {self.kind}",
            )
        names = " and ".join(f"'{escaped(name)}' ({column})" for column, name in self._looked_up(row))
        return (
            f"no {self.kind} file has its name: looked up {names}, the nearest is {escaped(self.names.nearest(name))}",
            f"write the name of its file into a column {self.kind}",
        )

    def _looked_up(self, row: Row) -> list[tuple[str, str]]:
        """Column and value of each name that a row's file may have."""
        if named := getattr(row, self.kind):
            return [(self.kind, named)]
        is_excerpt = row.start is not None or row.end is not None
        return [("uid", row.uid)] + ([("video", row.video)] if is_excerpt and row.video else [])

    def read(self, key: Any) -> bytes:
        """The bytes of a file that ``find`` named.

        Raises:
            PoseError: it cannot be read.
        """
        try:
            return self.container.read(key)
        except OSError as error:
            raise PoseError(f"the file cannot be read: {error.strerror or error}") from error


def open_features(path: Path) -> PoseFiles:
    """List the feature files of a folder, a zip or a tar, as :func:`open_poses`."""
    try:
        return _open(path, "features", FEATURE_SUFFIXES)
    except UserError as error:
        raise UserError(error.message, _CHECK_FEATURES) from error


def open_poses(path: Path) -> PoseFiles:
    """List the pose files of a folder, a zip or a tar.

    Any one of the parts of an archive (``x.zip.part_aa``, ``x.zip.001``) names all of it.

    Raises:
        UserError: it is not there, is none of these, or holds no pose file.
    """
    return _open(path, "pose", SUFFIXES)


def _open(path: Path, kind: str, suffixes: tuple[str, ...]) -> PoseFiles:
    try:
        container: _Container = _Folder(path, suffixes) if path.is_dir() else _open_archive(path, suffixes)
        entries = sorted(container.entries(), key=lambda entry: entry[0])
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}", _CHECK_PATH) from error
    if not entries:
        raise _no_files(path, container, suffixes)
    digest = xxhash.xxh3_64()
    last: dict[str, tuple[str, Any]] = {}
    for name, key, version in entries:
        # An archive may hold a name twice (tar -r); as in unpacking, the later file replaces the earlier one.
        last[posixpath.normpath(name)] = name, key
        digest.update(repr((name, version)).encode())
    files = dict(last.values())
    return PoseFiles(container, files, Names(files, str(path.absolute())), digest.hexdigest(), kind)


def _no_files(path: Path, container: _Container, suffixes: tuple[str, ...]) -> UserError:
    """The error for a folder or archive without files of a kind, which names what it has instead."""
    found = Counter(posixpath.splitext(name)[1].lower() for name in container.others())
    suffix, number = next(iter(found.most_common(1)), ("", 0))
    there = f", only {suffix or 'files without a suffix'} ({number:,})" if number else ""
    return UserError(f"{path} holds no {', '.join(suffixes)} file{there}", _INSTEAD.get(suffix, _CHECK_PATH))


class _Folder:
    """A folder, flat or nested; the key of a file is its path, which holds in every process of a cluster."""

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path, self.suffixes = path.absolute(), suffixes

    def entries(self) -> Iterator[tuple[str, str, object]]:
        return self._walk(str(self.path), "", frozenset())

    def others(self) -> Iterator[str]:
        for _, _, names in os.walk(self.path):
            yield from names

    def _walk(self, folder: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, str, object]]:
        above |= {os.path.realpath(folder)}
        with os.scandir(folder) as found:
            for entry in found:
                if entry.is_dir():
                    # A link to a folder above would be followed without end.
                    if not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                        yield from self._walk(entry.path, f"{prefix}{entry.name}/", above)
                elif is_pose_file(entry.name, self.suffixes) and entry.is_file():
                    status = entry.stat()
                    yield prefix + entry.name, entry.path, (status.st_size, status.st_mtime_ns)

    def read(self, key: str) -> bytes:
        return Path(key).read_bytes()


def _open_archive(path: Path, suffixes: tuple[str, ...]) -> _Container:
    joined = _JoinedParts(_parts_of(path))
    buffered = io.BufferedReader(joined)
    try:
        if zipfile.is_zipfile(buffered):
            return _Zip(path.absolute(), buffered, suffixes)
        if joined.pread(257, 5) == b"ustar":
            return _Tar(path.absolute(), buffered, joined, suffixes)
    except TooManyMembers as error:
        raise UserError(f"{path} is no archive of poses: {error}", "unpack it, and give the folder instead") from error
    except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is a damaged archive: {error}", "copy or download it again") from error
    if joined.pread(0, 2) == b"\x1f\x8b":
        raise UserError(f"{path} is compressed by gzip", "decompress it by gunzip, or pack the poses as a zip")
    if len(joined.paths) > 1:
        raise UserError(
            f"the {len(joined.paths)} parts of {path} are together no zip or tar", "check that the last part is there"
        )
    raise UserError(f"{path} is neither a folder nor a zip or tar", _CHECK_PATH)


def _parts_of(path: Path) -> list[Path]:
    """The file itself; or all parts of the archive that is named, by its own name or by that of one part.

    Raises:
        UserError: there is no such file, or a part is missing.
    """
    match = _as_part(path.name)
    if path.is_file() and not match:
        return [path]
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", _CHECK_PATH)
    parts: dict[int, Path] = {}
    for sibling in path.parent.iterdir():
        part = _as_part(sibling.name)
        if part and sibling.is_file() and (part[0] == match[0] if match else part[0].startswith(path.name + ".")):
            parts[part[1]] = sibling
    if not parts:
        raise UserError(f"there is no folder or archive {path}", _CHECK_PATH)
    first = 0 if 0 in parts else 1
    if sorted(parts) != list(range(first, first + len(parts))):
        missing = next(number for number in range(first, max(parts)) if number not in parts)
        raise UserError(
            f"{path}: {len(parts)} parts are there, but number {missing - first + 1} is missing",
            "download the missing part into the same folder",
        )
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
    """Several files read as one.

    Every read passes its offset to the system, so forked processes do not move each other's position.
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
        return self._ends[-1]

    def pread(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on; fewer only at the end."""
        chunks = []
        while size > 0 and offset < self._ends[-1]:
            part = bisect.bisect_right(self._ends, offset) - 1
            chunk = os.pread(self._files[part], min(size, self._ends[part + 1] - offset), offset - self._ends[part])
            if not chunk:
                raise OSError("the archive became shorter while it was read")
            chunks.append(chunk)
            offset, size = offset + len(chunk), size - len(chunk)
        return b"".join(chunks)

    def readinto(self, buffer: Any) -> int:
        content = self.pread(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, from_where: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[from_where]
        if start + offset < 0:
            raise OSError("seek before the beginning of the archive")
        self._position = start + offset
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


class _Zip:
    """A zip; the key of a file is its entry in the central directory."""

    def __init__(self, path: Path, file: IO[bytes], suffixes: tuple[str, ...]) -> None:
        self._path, self._suffixes = path, suffixes
        self._archive = open_zip(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_archive, (self._path, self._suffixes)  # each machine of a cluster opens the archive itself

    def entries(self) -> Iterator[tuple[str, zipfile.ZipInfo, object]]:
        for entry in self._archive.infolist():
            name = _zip_name(entry)
            if is_pose_file(name, self._suffixes):
                yield name, entry, (entry.file_size, entry.CRC)

    def others(self) -> list[str]:
        return [entry.filename for entry in self._archive.infolist() if not entry.is_dir()]

    def read(self, key: zipfile.ZipInfo) -> bytes:
        try:
            return read_member(self._archive, key)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            raise PoseError(f"the file cannot be read from the zip: {error}") from error


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The name of a member; macOS writes UTF-8 without marking it, and ``zipfile`` then decodes it as code page 437."""
    if not entry.flag_bits & 0x800 and not entry.filename.isascii():
        with contextlib.suppress(UnicodeError):
            return entry.filename.encode("cp437").decode("utf-8")
    return entry.filename


class _Tar:
    """An uncompressed tar; the key of a file is the offset and number of its bytes."""

    def __init__(self, path: Path, file: IO[bytes], joined: _JoinedParts, suffixes: tuple[str, ...]) -> None:
        self._path, self._suffixes = path, suffixes
        self._file, self._joined = file, joined  # kept, because closing the buffered file would close `joined`
        self._members: list[tuple[str, tuple[int, int], object]] = []
        folders = characters = 0
        for member in tar_members(file):
            if member.isreg() and not member.issparse() and is_pose_file(member.name, suffixes):
                self._members.append((member.name, (member.offset_data, member.size), (member.size, member.mtime)))
                folders, characters = folders + member.name.count("/"), characters + len(member.name)
                check_list(len(self._members), folders, characters, joined.size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_archive, (self._path, self._suffixes)

    def entries(self) -> list[tuple[str, tuple[int, int], object]]:
        return self._members

    def others(self) -> list[str]:
        return [member.name for member in tar_members(self._file) if member.isreg()]

    def read(self, key: tuple[int, int]) -> bytes:
        offset, size = key
        content = self._joined.pread(offset, size)
        if len(content) < size:
            raise PoseError("the tar ends within the file")
        return content
