"""Decompress clips in an amount of memory that their size bounds."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib

from toolkit.poses.pose_file import PoseError

_UNSUPPORTED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}


# An hour of 600 landmarks in float32 at 25 frames a second; what unpacks beyond it is no clip.
LARGEST_CLIP = 2**30

_PART = 1 << 22  # gzip and zipfile allocate what they are asked for


def check_size(size: int) -> None:
    """Raise PoseError for a file that has more bytes, decompressed, than any clip."""
    if size > LARGEST_CLIP:
        raise PoseError(f"decompressed, the file has more than {LARGEST_CLIP / 2**30:.0f} GiB")


def decompress(content: bytes) -> bytes:
    """The content of a file that is compressed by gzip, or of one that is not compressed.

    Raises:
        PoseError: the file is damaged, compressed by another program, or larger than any clip.
    """
    for first, name in _UNSUPPORTED.items():
        if content.startswith(first):
            raise PoseError(f"the file is compressed by {name}", "decompress it, or compress it by gzip")
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        found = bytearray()
        with gzip.open(io.BytesIO(content)) as file:
            while len(found) <= LARGEST_CLIP and (part := file.read(_PART)):
                found += part
    except (OSError, EOFError, zlib.error) as error:
        raise PoseError(f"the gzip file cannot be decompressed: {error}") from error
    check_size(len(found))
    return bytes(found)


def read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Decompress a member of a zip in parts: all at once, ``zipfile`` would exceed the size that the zip claims.

    Raises:
        PoseError: it is larger than any clip, or compressed by another method than deflate: the others decompress any
            number of bytes at once. Damaged members raise the errors of ``zipfile`` and ``zlib``.
    """
    check_size(entry.file_size)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PoseError("the file is compressed in its zip by another method than deflate", "pack the zip with deflate")
    found = bytearray()
    with archive.open(entry) as file:
        while content := file.read(_PART):
            found += content
    return bytes(found)
