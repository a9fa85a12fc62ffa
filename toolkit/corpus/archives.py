"""Where the pose files lie, and how the one that belongs to a row of the table is found and read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.poses.pose_file import PoseError

SUFFIXES = (".pose",)
LARGEST_CLIP = 1 << 30
"""Bytes; an hour of full holistic poses is 850 MB."""


@dataclass(frozen=True)
class PoseFolder:
    """A folder of pose files, flat or nested.

    Attributes:
        path: the folder.
        files: by path below the folder without suffix, and by bare name where that is unique: the file's path.
        identity: hash of all names, sizes and times of change.
    """

    path: Path
    files: dict[str, str]
    identity: str

    def find(self, row: Row) -> str | None:
        """The file that holds a row's clip, None if there is none."""
        names = [row.pose, row.uid, row.video if row.start is not None or row.end is not None else ""]
        for name in filter(None, names):
            for suffix in SUFFIXES:
                name = name.removesuffix(suffix)
            if name in self.files:
                return self.files[name]
        return None

    def read(self, file: str) -> bytes:
        """The bytes of a file that ``find`` named.

        Raises:
            PoseError: it cannot be read.
        """
        try:
            if os.path.getsize(self.path / file) > LARGEST_CLIP:
                raise PoseError(f"the file is larger than {LARGEST_CLIP >> 30} GiB")
            return (self.path / file).read_bytes()
        except OSError as error:
            raise PoseError(f"the file cannot be read: {error.strerror}") from error


def open_poses(path: Path) -> PoseFolder:
    """Look through a place with pose files.

    Raises:
        UserError: there is none, or it holds no pose file.
    """
    if not path.exists():
        raise UserError(f"there is no folder {path}: data.poses wants the folder that holds the .pose files")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: data.poses wants the folder that holds the .pose files")
    entries = sorted(_walk(path, ""))
    if not entries:
        raise UserError(f"the folder {path} holds no .pose file: is data.poses right?")
    files: dict[str, str] = {}
    twice: set[str] = set()
    for name, _, _ in entries:
        bare = os.path.splitext(os.path.basename(name))[0]
        if bare in files:
            twice.add(bare)
        files[bare] = name
    for bare in twice:
        del files[bare]
    files |= {os.path.splitext(name)[0]: name for name, _, _ in entries}
    digest = xxhash.xxh3_64()
    for entry in entries:
        digest.update(repr(entry).encode())
    return PoseFolder(path, files, digest.hexdigest())


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Path below the folder, size and time of change of every pose file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=True):
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.name.endswith(SUFFIXES):
                status = entry.stat()
                yield prefix + entry.name, status.st_size, status.st_mtime_ns
