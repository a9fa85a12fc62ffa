"""Decompress clips that were compressed one by one."""

from __future__ import annotations

import gzip
import zlib

from toolkit.poses.pose_file import PoseError

_UNSUPPORTED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}


def decompress(content: bytes) -> bytes:
    """The content of a file that is compressed by gzip, or of one that is not compressed.

    Raises:
        PoseError: the file is damaged, or compressed by another program.
    """
    for first, name in _UNSUPPORTED.items():
        if content.startswith(first):
            raise PoseError(f"the file is compressed by {name}: decompress it, or compress it by gzip")
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise PoseError(f"the gzip file cannot be decompressed: {error}") from error
