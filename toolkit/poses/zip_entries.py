"""One file out of a stranger's zip, without believing what the zip says of its size."""

from __future__ import annotations

import zipfile
import zlib

from toolkit.poses.pose_file import PoseError

LARGEST_RATIO = 100
"""Of a file to its compressed form; poses reach 10, a bomb 1,000."""
# The compressions whose output can be asked for in pieces; of the others a few bytes may become gigabytes at once.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of a file in a zip; never more memory is taken than its claimed size, which must be possible.

    Raises:
        PoseError: it is damaged, encrypted, a bomb, or compressed in a way that cannot be read safely.
    """
    if entry.compress_type not in _BOUNDED:
        raise PoseError("the zip uses a compression other than deflate")
    if entry.file_size > LARGEST_RATIO * entry.compress_size + (1 << 20):
        raise PoseError("the zip claims an impossible size for the file")
    try:
        with archive.open(entry) as file:
            # Without a size all that is compressed would be unpacked before the claimed size is looked at.
            content = file.read(entry.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise PoseError(f"the file cannot be read from the zip: {error}") from error
    if len(content) != entry.file_size:
        raise PoseError("the file ends early in the zip")
    return content
