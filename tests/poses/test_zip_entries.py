"""Bombs and lies in a zip cost neither memory nor more than their own clip."""

import io
import struct
import tracemalloc
import zipfile

import pytest

from toolkit.poses.pose_file import PoseError
from toolkit.poses.zip_entries import read_entry


def _zip(content: bytes, method: int) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.pose", content)
    return bytearray(buffer.getvalue())


def _read(archive: bytearray) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return read_entry(opened, opened.infolist()[0])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_was_packed_is_read(method: int) -> None:
    content = bytes(range(256)) * 100
    assert _read(_zip(content, method)) == content
    assert _read(_zip(b"", method)) == b""


def _claim(archive: bytearray, size: int) -> bytearray:
    """Let the central directory claim another size of the file."""
    struct.pack_into("<I", archive, archive.rindex(b"PK\x01\x02") + 24, size)
    return archive


@pytest.mark.parametrize("claimed", [10, 100_000])
def test_a_bomb_that_claims_to_be_small_takes_no_more_than_it_claims(claimed: int) -> None:
    archive = _claim(_zip(bytes(200 << 20), zipfile.ZIP_DEFLATED), claimed)
    tracemalloc.start()
    with pytest.raises(PoseError, match="Bad CRC"):
        _read(archive)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_file_that_is_shorter_than_claimed_is_a_reason() -> None:
    with pytest.raises(PoseError):
        _read(_claim(_zip(b"abc" * 100, zipfile.ZIP_DEFLATED), 5000))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_cannot_be_bounded_are_refused(method: int) -> None:
    with pytest.raises(PoseError, match="other than deflate"):
        _read(_zip(bytes(50 << 20), method))
