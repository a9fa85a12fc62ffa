"""Read ``.npy``, ``.npz`` and pickle files into named arrays and lists; no code of a pickle runs."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.poses.compressed import check_size, read_member
from toolkit.poses.pickles import read_pickle
from toolkit.poses.pose_file import PoseError

KEYPOINT_NAMES = ("keypoints", "landmarks", "poses", "pose", "data")
CONFIDENCE_NAMES = ("scores", "confidence", "confidences", "conf")
"""Accepted names of the arrays; if a file has several of them, the first is read."""

# Protocol 0 begins with the instruction that makes its outermost object: a dict, a list, or the function of an array.
_FIRST_OF_A_PICKLE = (b"\x80", b"(", b"}", b"]", b"cnumpy")
_MOST_MEMBERS = 1000  # of an .npz; zipfile describes each before any is read
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
"""First bytes of the files of one array and of several."""
_ZIP_ENTRY = b"PK\x01\x02"


def is_array_file(content: bytes) -> bool:
    """Whether this is an ``.npy``, ``.npz`` or pickle file rather than a ``.pose`` file, by its first bytes."""
    return content.startswith((NPY, ZIP, *_FIRST_OF_A_PICKLE))


def read_named_arrays(content: bytes) -> dict[str, Any]:
    """Read all arrays of a file, by name.

    Raises:
        PoseError: the file holds something else. Damaged files raise the errors of numpy, ``zipfile`` and ``pickle``.
    """
    if content.startswith(NPY):
        return _by_name(read_npy(content, with_objects=True), "file")
    if content.startswith(ZIP):
        return read_npz(content, (*KEYPOINT_NAMES, *CONFIDENCE_NAMES, "fps"), with_objects=True)
    return _by_name(read_pickle(content), "pickle")


def _by_name(found: Any, what: str) -> dict[str, Any]:
    if isinstance(found, np.ndarray) and found.dtype.hasobject and found.size == 1 and isinstance(found.item(), dict):
        found = found.item()  # numpy.save writes a dict as an array of one object
    if isinstance(found, dict):
        return {_key(key): value for key, value in found.items()}
    if isinstance(found, np.ndarray):
        return {KEYPOINT_NAMES[0]: found}
    raise PoseError(
        f"the {what} holds a {type(found).__name__}, wanted a dict with {KEYPOINT_NAMES[0]} and {CONFIDENCE_NAMES[0]}"
    )


def _key(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode("latin1")
    return key if isinstance(key, str) else f"({type(key).__name__})"


def read_npy(content: bytes, *, with_objects: bool = False) -> Any:
    """The array of an ``.npy`` file; raises PoseError for one of objects, unless it is to be read ``with_objects``."""
    file = io.BytesIO(content)
    major, _ = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject and not with_objects:
        raise PoseError("the array holds objects, wanted numbers")
    if dtype.hasobject:
        return read_pickle(content[file.tell() :])  # numpy.save pickles arrays of objects
    size, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if size != there:
        raise PoseError(f"the array of shape {shape} needs {size:,} bytes, and the file has {there:,}")
    # A view; numpy.load would allocate what the header claims, and copy.
    return np.ndarray(shape, dtype, content, file.tell(), order="F" if is_fortran else "C")


def read_npz(content: bytes, names: Sequence[str], *, with_objects: bool = False) -> dict[str, Any]:
    """Those arrays of an ``.npz`` that have one of these names; where there is none, all other names without arrays.

    The only array of a file is read under any name.
    """
    if (entries := content.count(_ZIP_ENTRY)) > _MOST_MEMBERS:
        raise PoseError(f"the .npz holds {entries:,} arrays, wanted at most {_MOST_MEMBERS:,}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        wanted = [name for name in names if name in members] or (list(members) if len(members) == 1 else [])
        check_size(sum(archive.getinfo(members[name]).file_size for name in wanted))
        found = {
            name: read_npy(read_member(archive, archive.getinfo(members[name])), with_objects=with_objects)
            for name in wanted
        }
    return found or dict.fromkeys(members)
