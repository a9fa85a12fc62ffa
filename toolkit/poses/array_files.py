"""Read ``.npy``, ``.npz`` and pickle files into named arrays and lists; no code of a pickle runs."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import numpy as np

from toolkit.poses.compressed import check_size
from toolkit.poses.pose_file import PoseError

KEYPOINT_NAMES = ("keypoints", "landmarks", "poses", "pose", "data")
CONFIDENCE_NAMES = ("scores", "confidence", "confidences", "conf")
"""Accepted names of the arrays; if a file has several of them, the first is read."""

# All that numpy arrays are pickled with, in every protocol and by every version of numpy and Python.
_ALLOWED_GLOBALS = {
    (module, name)
    for core in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{core}.multiarray", "_reconstruct"),
        (f"{core}.multiarray", "scalar"),
        (f"{core}.numeric", "_frombuffer"),
    )
} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("__builtin__", "bytes"),
    ("builtins", "bytes"),
}
# Protocol 0 begins with the instruction that makes its outermost object: a dict, a list, or the function of an array.
_FIRST_OF_A_PICKLE = (b"\x80", b"(", b"}", b"]", b"cnumpy")
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"


def is_array_file(content: bytes) -> bool:
    """Whether this is an ``.npy``, ``.npz`` or pickle file rather than a ``.pose`` file, by its first bytes."""
    return content.startswith((_NPY, _ZIP, *_FIRST_OF_A_PICKLE))


def read_named_arrays(content: bytes) -> dict[str, Any]:
    """Read all arrays of a file, by name.

    Raises:
        PoseError: the file holds something else. Damaged files raise the errors of numpy, ``zipfile`` and ``pickle``.
    """
    if content.startswith(_NPY):
        return _by_name(_read_npy(content), "file")
    if content.startswith(_ZIP):
        return _read_npz(content)
    return _by_name(_read_pickle(content), "pickle")


def _by_name(found: Any, what: str) -> dict[str, Any]:
    if isinstance(found, np.ndarray) and found.dtype.hasobject and found.size == 1 and isinstance(found.item(), dict):
        found = found.item()  # numpy.save writes a dict as an array of one object
    if isinstance(found, dict):
        return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}
    if isinstance(found, np.ndarray):
        return {KEYPOINT_NAMES[0]: found}
    raise PoseError(
        f"the {what} holds a {type(found).__name__}, wanted a dict with {KEYPOINT_NAMES[0]} and {CONFIDENCE_NAMES[0]}"
    )


def _read_npy(content: bytes) -> Any:
    file = io.BytesIO(content)
    major, _ = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    if read_header(file)[2].hasobject:
        return _read_pickle(content[file.tell() :])  # numpy.save pickles arrays of objects
    return np.load(io.BytesIO(content), allow_pickle=False)


def _read_npz(content: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        wanted = [name for name in (*KEYPOINT_NAMES, *CONFIDENCE_NAMES, "fps") if name in members]
        check_size(sum(archive.getinfo(members[name]).file_size for name in wanted))
        found = {name: _read_npy(archive.read(members[name])) for name in wanted}
    return found or dict.fromkeys(members)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; anything else that a pickle names could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise PoseError(
                f"the pickle asks for {f'{module}.{name}'[:80]!r}: only arrays and plain containers are read"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise PoseError("the pickle asks for an object outside of it: only arrays and plain containers are read")


def _read_pickle(content: bytes) -> Any:
    # Python 2 wrote the bytes of arrays as text.
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
