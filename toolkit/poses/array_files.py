"""The bytes of ``.npy``, ``.npz`` and pickle files become named arrays and lists, without trusting them.

A pickle is a program, and a stranger's is not run: only plain containers and numpy arrays come out of one, and whatever
else it asks for is a reason to reject it. Sizes that a file claims are compared with its length before memory is taken.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from typing import Any

import numpy as np

from toolkit.poses.pose_file import PoseError
from toolkit.poses.zip_entries import read_entry

KEYPOINTS = ("keypoints", "landmarks", "poses", "pose", "data")
SCORES = ("scores", "confidence", "confidences", "conf")
"""What the arrays are called; of several the first."""

_NUMPY_GLOBALS = {
    (module, name)
    for core in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{core}.multiarray", "_reconstruct"),
        (f"{core}.multiarray", "scalar"),
        (f"{core}.numeric", "_frombuffer"),
    )
} | {("numpy", "ndarray"), ("numpy", "dtype")}
# Protocol 0 begins with the instruction that makes its outermost object: a dict, a list, or the function of an array.
_FIRST_OF_A_PICKLE = (b"\x80", b"(", b"}", b"]", b"cnumpy")
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
# Bytes of memory that an instruction of one byte or a few can take; of all others the file's length is a measure.
_OBJECT_BYTES = {"EMPTY_SET": 224, "FROZENSET": 224, "EMPTY_LIST": 72, "LIST": 72, "EMPTY_DICT": 72, "DICT": 72}
_OBJECT_BYTES |= {"TUPLE": 64, "TUPLE1": 56, "TUPLE2": 64, "TUPLE3": 72, "REDUCE": 128, "NEWOBJ": 128}
_MOST_FOR_OBJECTS = 64 << 20


def is_array_file(content: bytes) -> bool:
    """Whether this is an ``.npy``, ``.npz`` or pickle file rather than a ``.pose`` file, by its first bytes."""
    return content[:6] == b"\x93NUMPY" or content[:4] == b"PK\x03\x04" or content.startswith(_FIRST_OF_A_PICKLE)


def read_named_arrays(content: bytes) -> tuple[dict[str, Any], int]:
    """What a file holds by name, and its size in bytes when it is not compressed.

    Raises:
        PoseError: it holds something else. Damaged files raise whatever the readers of numpy and pickles do.
    """
    if content[:6] == b"\x93NUMPY":
        return _by_name(_read_npy(content), "file"), len(content)
    if content[:4] == b"PK\x03\x04":
        return _read_npz(content)
    return _by_name(_read_pickle(content), "pickle"), len(content)


def _by_name(found: Any, what: str) -> dict[str, Any]:
    if isinstance(found, np.ndarray) and found.dtype.hasobject and found.size == 1 and isinstance(found.item(), dict):
        found = found.item()  # what numpy.save makes of a dict
    if isinstance(found, dict):
        return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}
    if isinstance(found, np.ndarray):
        return {KEYPOINTS[0]: found}
    raise PoseError(f"the {what} holds a {type(found).__name__}, wanted a dict with {KEYPOINTS[0]} and {SCORES[0]}")


def _read_npy(content: bytes) -> np.ndarray[Any, Any]:
    file = io.BytesIO(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read_header:
        raise PoseError("the .npy file is of an unknown version")
    shape, fortran_order, dtype = read_header[version](file)
    if dtype.hasobject and dtype.names is None:
        found = _read_pickle(content[file.tell() :])
        if not isinstance(found, np.ndarray):
            raise PoseError(f"the .npy file holds a {type(found).__name__}, wanted an array")
        return found
    if dtype.kind not in "fiu":
        raise PoseError(f"the array holds {dtype}, wanted numbers")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize > len(content) - file.tell():
        raise PoseError("the array is truncated")
    flat = np.frombuffer(content, dtype, count, file.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _read_npz(content: bytes) -> tuple[dict[str, Any], int]:
    found, size = {}, 0
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            # Of what else is in there nobody knows how large it is.
            name = entry.filename.removesuffix(".npy")
            if name != entry.filename and name in (*KEYPOINTS, *SCORES, "fps"):
                found[name] = _read_npy(read_entry(archive, entry))
                size += entry.file_size
        names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    return found or dict.fromkeys(names), size


def _latin1(text: str, encoding: str) -> bytes:
    """The one use that numpy makes of ``codecs.encode``: bytes in pickles of old protocols. Others may be slow."""
    if encoding not in ("latin1", "latin-1"):
        raise PoseError(
            f"the pickle asks for the encoding {encoding[:40]!r}: only arrays and plain containers are read"
        )
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """What old protocols call ``bytes()``, for the content of an empty array; of any other length it takes memory."""
    return b""


class _ArraysOnly(pickle.Unpickler):
    """Admits what numpy arrays are made of and nothing else; containers and numbers need no admission."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")):
            return _no_bytes
        if (module, name) not in _NUMPY_GLOBALS:
            raise PoseError(
                f"the pickle asks for {f'{module}.{name}'[:80]!r}: only arrays and plain containers are read"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise PoseError("the pickle asks for an object outside of it: only arrays and plain containers are read")


def _read_pickle(content: bytes) -> Any:
    # Reading the instructions without following them finds lengths beyond the end, absurd numbers of remembered
    # objects and floods of empty ones, for any of which the real reader would take memory first.
    taken = 0
    for opcode, argument, _ in pickletools.genops(content):
        taken += _OBJECT_BYTES.get(opcode.name, 0)
        if (opcode.name in _MEMO_OPCODES and int(argument or 0) > len(content)) or (
            taken > 4 * len(content) + _MOST_FOR_OBJECTS
        ):
            raise PoseError("the pickle claims an impossible size")
    # Python 2 wrote the bytes of arrays as text.
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
