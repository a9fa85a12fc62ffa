"""Keypoints in ``.npy``, ``.npz`` and ``.pkl`` files: arrays whose points have no names, read without trusting them.

A pickle is a program, and a stranger's is not run: only plain containers and numpy arrays come out of one, and whatever
else it asks for is a reason to reject it. Sizes that a file claims are compared with its length before memory is taken.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from toolkit.poses.layouts import FACE_68, nameless_layouts
from toolkit.poses.pose_file import FloatArray, PoseError, PoseHeader, RawPose, checked_fps
from toolkit.poses.zip_entries import read_entry

DEFAULT_FPS = 25.0
"""Of arrays that do not tell: neither the file (``fps``) nor the table."""

_KEYPOINTS = ("keypoints", "landmarks", "poses", "pose", "data")
_SCORES = ("scores", "confidence", "confidences", "conf")
_NUMPY_GLOBALS = {
    (module, name)
    for core in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{core}.multiarray", "_reconstruct"),
        (f"{core}.multiarray", "scalar"),
        (f"{core}.numeric", "_frombuffer"),
    )
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_DEEPEST = 4  # frames, people, points, coordinates
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")


def is_array_file(content: bytes) -> bool:
    """Whether this is an ``.npy``, ``.npz`` or ``.pkl`` file rather than a ``.pose`` file, by its first bytes."""
    return content[:6] == b"\x93NUMPY" or content[:4] == b"PK\x03\x04" or content[:1] == b"\x80"


def read_arrays(content: bytes, fps: float | None = None) -> RawPose:
    """Read keypoints.

    The arrays are keypoints [frames, points, 2..4] or [frames, people, points, 2..4] and, where the file holds more
    than one, scores without the last axis and ``fps``. The number of points tells their names. The third of three
    coordinates is a score for OpenPose and COCO-WholeBody, else z; the fourth of four is a score. Without scores a
    point at the origin is missing.

    Raises:
        PoseError: the bytes are no such file.
    """
    try:
        # Damaged files make the readers of numbers and of pickles warn of what is a reject anyway.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return _to_pose(_read(content), len(content), fps)
    except PoseError:
        raise
    except Exception as error:  # a damaged array file fails in too many ways to name, and each is only this clip's
        raise PoseError(f"the arrays cannot be read: {type(error).__name__}") from error


def _read(content: bytes) -> dict[str, Any]:
    if content[:6] == b"\x93NUMPY":
        return {_KEYPOINTS[0]: _read_npy(content)}
    return _read_npz(content) if content[:4] == b"PK\x03\x04" else _read_pickle(content)


def _read_npy(content: bytes) -> np.ndarray[Any, Any]:
    file = io.BytesIO(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read_header:
        raise PoseError("the .npy file is of an unknown version")
    shape, fortran_order, dtype = read_header[version](file)
    if dtype.kind not in "fiu":
        raise PoseError(f"the array holds {dtype}, wanted numbers")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize > len(content) - file.tell():
        raise PoseError("the array is truncated")
    flat = np.frombuffer(content, dtype, count, file.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _read_npz(content: bytes) -> dict[str, Any]:
    found = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".npy"):
                found[entry.filename.removesuffix(".npy")] = _read_npy(read_entry(archive, entry))
    return found


class _ArraysOnly(pickle.Unpickler):
    """Admits what numpy arrays are made of and nothing else; containers and numbers need no admission."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_GLOBALS:
            raise PoseError(
                f"the pickle asks for {f'{module}.{name}'[:80]!r}: only arrays and plain containers are read"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise PoseError("the pickle asks for an object outside of it: only arrays and plain containers are read")


def _read_pickle(content: bytes) -> dict[str, Any]:
    # Reading the instructions without following them finds lengths beyond the end and absurd numbers of remembered
    # objects, for either of which the real reader would take memory first.
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _MEMO_OPCODES and int(argument or 0) > len(content):
            raise PoseError("the pickle claims an impossible size")
    found = _ArraysOnly(io.BytesIO(content)).load()
    if not isinstance(found, dict):
        raise PoseError(
            f"the pickle holds a {type(found).__name__}, wanted a dict with {_KEYPOINTS[0]} and {_SCORES[0]}"
        )
    return {str(key): value for key, value in found.items()}


def _numbers(value: Any, most_bytes: int) -> FloatArray:
    """An array, or lists of numbers or of one array a frame, as float32."""
    if _size(value, most_bytes, depth=0) > most_bytes:
        raise PoseError("the arrays are larger than the file")
    together = np.asarray(value)
    if together.dtype.kind not in "fiu":
        raise PoseError("the frames do not all hold the same number of points")
    return together.astype(np.float32)


def _size(value: Any, most: int, depth: int) -> int:
    """Bytes that the array of some nested lists would take; any number above ``most`` when that is exceeded.

    A list may hold another one many times over, or itself, so a small file could ask for an array without end.
    """
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, int | float | np.number):
        return 4
    if not isinstance(value, list | tuple):
        raise PoseError(f"the arrays hold a {type(value).__name__}, wanted numbers")
    if depth == _DEEPEST:
        raise PoseError("the lists are nested too deep")
    size = 0
    for item in value:
        size += _size(item, most - size, depth + 1)
        if size > most:
            break
    return size


@lru_cache(maxsize=16)
def _header(num_points: int, dims: int) -> PoseHeader:
    points = nameless_layouts()[num_points]
    sizes = tuple((len(list(group)), dims) for _, group in groupby(points, key=lambda point: point[0]))
    return PoseHeader(0.0, points, sizes)


def _to_pose(found: dict[str, Any], size: int, told_fps: float | None) -> RawPose:
    """Give the arrays of a file of ``size`` bytes the names and the form of a pose file."""
    name = next((name for name in _KEYPOINTS if name in found), None)
    if name is None:
        raise PoseError(f"none of the arrays is called {', '.join(_KEYPOINTS)}")
    most_bytes = 100 * size
    values = _numbers(found[name], most_bytes)
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or not 2 <= values.shape[3] <= 4 or 0 in values.shape:
        raise PoseError(f"the keypoints have shape {values.shape}, wanted [frames, points, 2..4]")
    points = nameless_layouts().get(values.shape[2])
    if points is None:
        known = ", ".join(map(str, sorted(nameless_layouts())))
        raise PoseError(f"an array of {values.shape[2]} points without names: known are {known}")

    score_name = next((name for name in _SCORES if name in found), None)
    flat_layout = any(component == FACE_68 for component, _ in points)
    if score_name is not None:
        confidence = _numbers(found[score_name], most_bytes).reshape(values.shape[:3])
    elif values.shape[3] == 4 or (values.shape[3] == 3 and flat_layout):
        values, confidence = values[..., :-1], values[..., -1]
    else:
        confidence = np.asarray(values.any(axis=3), np.float32)
    if flat_layout:
        values = values[..., :2]
    return RawPose(
        checked_fps(_claimed_fps(found, most_bytes) if told_fps is None else DEFAULT_FPS, told_fps),
        _header(len(points), values.shape[3]),
        np.ascontiguousarray(values),
        np.ascontiguousarray(confidence),
    )


def _claimed_fps(found: dict[str, Any], most_bytes: int) -> float:
    told = found.get("fps", DEFAULT_FPS)
    _size(told, most_bytes, depth=0)
    return float(np.asarray(told).reshape(()))
