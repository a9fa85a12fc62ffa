"""No file costs more than 10 times its uncompressed size + 200 MiB to read, whatever its counts claim."""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.peak_memory import SLACK, growth, over_limit
from toolkit.poses.compressed import decompress
from toolkit.poses.pose_file import PoseError

pytestmark = pytest.mark.process


def _uncompressed_size(content: bytes) -> int:
    try:
        size = len(decompress(content))
    except PoseError:
        size = len(content)
    if content.startswith(b"PK"):
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
        except Exception:
            pass  # damaged
    return size


def _check(folder: Path, contents: dict[str, bytes]) -> None:
    for number, content in enumerate(contents.values()):
        (folder / str(number)).write_bytes(content)
    files = {
        name: (folder / str(number), _uncompressed_size(content))
        for number, (name, content) in enumerate(contents.items())
    }
    assert not over_limit("clip", files)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _seeds(pose_file) -> dict[str, bytes]:
    keypoints, scores = np.full((30, 133, 2), 7, np.float32), np.ones((30, 133), np.float32)
    body = pose_file.body(30, people=2)
    return {
        **{f"pose v{version}": pose_file.bytes(*body, version=version) for version in (0.0, 0.1, 0.2)},
        "npy": _npy(keypoints),
        "npy of a dict": _npy(np.array({"keypoints": keypoints})),
        "npz": _npz(keypoints=keypoints, scores=scores),
        "gzip": gzip.compress(_npy(keypoints)),
        **{
            f"pickle {protocol}": pickle.dumps({"keypoints": list(keypoints), "scores": scores}, protocol=protocol)
            for protocol in (0, 2, 4, 5)
        },
        "nested lists": pickle.dumps({"keypoints": keypoints[:3].tolist()}),
        "json": b'{"version": 1.3, "people": [' + b"[" * 100_000,
        "hdf5": b"\x89HDF\r\n\x1a\n" + b"\xff" * 4096,
    }


def _pickled(body: bytes, before: bytes = b"") -> bytes:
    return b"\x80\x04" + before + b"}\x8c\x09keypoints" + body + b"s."


def _nested(depth: int, innermost: object) -> object:
    for _ in range(depth):
        innermost = [innermost, innermost]
    return innermost


def _object_array(shape: tuple[int, ...]) -> bytes:
    state = (1, shape, np.dtype(object), False, [None])
    fields = pickle.dumps(state, protocol=2)[2:-1]
    return b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + fields + b"b."


def _inflated(pose_file) -> dict[str, bytes]:
    """Small files that claim much."""
    header = pose_file.header(0.2)
    v00 = pose_file.header(0.0)
    one = v00 + struct.pack("<HH", 25, 65_535) + struct.pack("<H", 0) * 65_534
    person = struct.pack("<Hh", 1, 0) + bytes(4 * 4 * len(pose_file.points))
    wide = struct.pack("<fHHHH", 0.0, 1, 1, 0, 1) + struct.pack("<H", 1) + b"A" + struct.pack("<H", 3) + b"XYC"
    points = wide + struct.pack("<HHH", 65_535, 0, 0) + bytes(2 * 65_535) + struct.pack("<HH", 25, 65_535)
    component = struct.pack("<H", 1) + b"A" + struct.pack("<H", 3) + b"XYC" + struct.pack("<HHH", 65_535, 0, 0)
    single = struct.pack("<fHHHH", 0.2, 1, 1, 0, 1) + struct.pack("<H", 1) + b"A" + struct.pack("<H", 3) + b"XYC"
    single += struct.pack("<HHH", 1, 0, 0) + struct.pack("<H", 0)
    npy_header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 133, 2), }"
    frame = np.ones((133, 2), np.float32)
    return {
        "frames of v0.2": header + struct.pack("<fIH", 25, 2**31, 1) + bytes(1000),
        "people of v0.2": header + struct.pack("<fIH", 25, 2, 65_535) + bytes(1000),
        "frames of v0.0 without people": one + person,
        "frames of many points": points + struct.pack("<Hh", 1, 0) + bytes(12 * 65_535) + bytes(2 * 65_534),
        "points of a header": struct.pack("<fHHHH", 0.2, 1, 1, 0, 150) + (component + bytes(2 * 65_535)) * 150,
        "a crowd": single + struct.pack("<fIH", 25, 1, 65_535) + np.ones(3 * 65_535, "<f4").tobytes(),
        "a shape of npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(npy_header)) + npy_header + bytes(1000),
        "bytes of a pickle": _pickled(b"\x8e" + struct.pack("<Q", 2**32) + b"abc"),
        "bytearray of a pickle": b"\x80\x05}\x8c\x09keypoints\x96" + struct.pack("<Q", 2**32) + b"abcs.",
        "memo of a pickle": _pickled(b"N", b"Nr" + struct.pack("<I", 100_000_000)),
        "lists of a pickle": _pickled(b"(" + b"]" * 12_000_000 + b"l"),
        "an array of objects": _object_array((500_000_000,)),
        "a call of ndarray": b"\x80\x02cnumpy\nndarray\nJ\x00\x00\x00\x40\x85R.",
        "a call of bytes": b"\x80\x02c__builtin__\nbytes\nJ\x00\x00\x00\x40\x85R.",
        "a scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\x00\x00\x00V1000000000\x85R\x85R.",
        "lists in lists": pickle.dumps({"keypoints": [_nested(26, 1.5)]}),
        "a word among numbers": pickle.dumps({"keypoints": [["a" * 20_000, *range(20_000)]]}),
        "one frame many times": pickle.dumps({"keypoints": [frame] * 400_000}),
        "frames without people": pickle.dumps({"keypoints": [frame] + [None] * 1_000_000}),
        "gzip": gzip.compress(pickle.dumps({"keypoints": [frame] * 400_000})),
        "names of an npz": _npz(**{f"a{number}": np.zeros(0) for number in range(3000)}),
        "a small npz with gzip": gzip.compress(_npz(keypoints=np.zeros((100, 133, 2)))),
        "uint8": _npy(np.ones((40_000, 133, 4), np.uint8)),
        "two people": pose_file.bytes(*pose_file.body(20_000, people=2)),
    }


def _damaged(seeds: dict[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    """Truncated and padded files, and files with bytes overwritten by large numbers."""
    random = np.random.default_rng(0)
    patches = [
        b"\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\xff" * 8,
        b"999999",
        b"r\xff\xff\xff\x7f",
        b"\x8e\x00\x00\x00\x00\x02",
    ]
    names = sorted(seeds)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(seeds[name])
        if random.random() < 0.2:
            del content[int(random.integers(len(content))) :]
        elif random.random() < 0.2:
            content += bytes(int(random.integers(1, 10_000)))
        for _ in range(int(random.integers(0, 4))):
            # Counts are at the beginning, or follow the header of 53 points.
            place = int(random.integers(min(len(content), int(random.choice([60, 900, 4000]))) + 1))
            patch = patches[int(random.integers(len(patches)))]
            content[place : place + len(patch)] = patch
        yield f"{name}, {number}", bytes(content)


def test_files_that_claim_much(pose_file, tmp_path: Path) -> None:
    _check(tmp_path, _inflated(pose_file))


def test_damaged_files(pose_file, tmp_path: Path) -> None:
    seeds = _seeds(pose_file)
    _check(tmp_path, seeds | dict(_damaged(seeds, 60)))


@pytest.mark.nightly
def test_many_damaged_files(pose_file, tmp_path: Path) -> None:
    contents = list(_damaged(_seeds(pose_file), 20_000))
    for start in range(0, len(contents), 500):
        _check(tmp_path, dict(contents[start : start + 500]))


def _numpy_load(content: bytes) -> None:
    np.load(io.BytesIO(content))


def _pickle_loads(content: bytes) -> None:
    pickle.loads(content)


@pytest.mark.parametrize(
    ("name", "reader"),
    [("a shape of npy", _numpy_load), ("bytes of a pickle", _pickle_loads), ("memo of a pickle", _pickle_loads)],
)
def test_a_reader_that_allocates_what_a_file_claims_is_measured(
    pose_file, name: str, reader: Callable[[bytes], None]
) -> None:
    content = _inflated(pose_file)[name]

    def read() -> None:
        with contextlib.suppress(ValueError, pickle.UnpicklingError, EOFError):
            reader(content)

    assert growth(read) > 10 * _uncompressed_size(content) + SLACK
