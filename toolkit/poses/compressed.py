"""Clips that were compressed one by one: gzip is unpacked, within a limit; what cannot be read is told by its name."""

from __future__ import annotations

import gzip
import io
import zlib

from toolkit.poses.pose_file import PoseError
from toolkit.poses.zip_entries import LARGEST_RATIO

LARGEST_UNPACKED = 1 << 30
"""Bytes."""
_PIECE = 1 << 20
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}


def unpacked(content: bytes) -> bytes:
    """The clip itself, whether it was compressed or not.

    Raises:
        PoseError: it is damaged, larger than 100 times its compressed form or than 1 GiB, or compressed by other means.
    """
    for first, name in _OTHERS.items():
        if content.startswith(first):
            raise PoseError(f"the file is compressed by {name}: unpack it, or compress it by gzip")
    if content[:2] != b"\x1f\x8b":
        return content
    most = min(LARGEST_RATIO * len(content) + _PIECE, LARGEST_UNPACKED)
    result = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while piece := file.read(_PIECE):
                result += piece
                if len(result) > most:
                    raise PoseError(f"the gzip file unpacks to more than {most:,} bytes")
    except (OSError, EOFError, zlib.error) as error:
        raise PoseError(f"the gzip file cannot be unpacked: {error}") from error
    return bytes(result)
