"""Unpickle numpy arrays and plain containers: no code of a pickle runs, and no number in it allocates memory."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from toolkit.poses.pose_file import PoseError

# Bytes of memory of one object with its place in a list, which may take a single byte of the file.
_CONTAINER, _TEXT, _NUMBER = 96, 64, 40
_COST = (
    dict.fromkeys(
        ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "REDUCE", "NEWOBJ"), _CONTAINER
    )
    | dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), _CONTAINER)
    | dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "SHORT_BINBYTES", "BINBYTES"), _TEXT)
    | dict.fromkeys(("SHORT_BINSTRING", "BINSTRING", "STRING", "LONG", "LONG1"), _TEXT)
    | dict.fromkeys(("BINFLOAT", "FLOAT", "BININT", "BININT2", "INT"), _NUMBER)
)
_MOST_COST, _COST_BEYOND = 7, 100 << 20  # for each byte of the file, and whatever its size
_CODE = re.compile(r"[<>|=]?[?bhilqpBHILQPefdgFDGOSUVaMm?u][0-9]{0,9}", re.ASCII)
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def read_pickle(content: bytes) -> Any:
    """Read a pickle of any protocol.

    Raises:
        PoseError: it asks for other objects than arrays and plain containers, or for more memory than its size
            justifies. Damaged files raise the errors of numpy, ``pickle`` and ``pickletools``.
    """
    _check_memory(content)
    # Python 2 wrote the bytes of arrays as text.
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


def _check_memory(content: bytes) -> None:
    """Refuse what ``pickle`` would allocate before it looks at the bytes: by a length, an index, or tiny objects."""
    cost = 0
    for opcode, argument, _ in pickletools.genops(content):  # checks each length
        name = opcode.name
        cost += _COST.get(name, 8)
        if name in _PUTS and int(argument or 0) > len(content):
            raise PoseError(f"the pickle is damaged: it numbers an object {argument:,}")
    if cost > _MOST_COST * len(content) + _COST_BEYOND:
        raise PoseError(
            f"the pickle holds so many small objects that they need {cost >> 20:,} MiB", "save arrays instead"
        )


class _Kind:
    """What a pickle says about a dtype. numpy's own would take any state, and a damaged one ends the process."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise PoseError(f"the pickle is damaged: an array of type {str(code)[:40]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose shape is checked before numpy allocates it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        shape, kind, is_fortran, content = state[-4:]  # older numpy wrote no version before them
        if self.size or not isinstance(kind, _Kind):
            raise PoseError("the pickle is damaged: an array without a type, or with two contents")
        size = math.prod(shape) * (1 if kind.dtype.hasobject else kind.dtype.itemsize)
        if min(shape, default=0) < 0 or not isinstance(content, list | bytes | str) or len(content) != size:
            raise PoseError(f"the pickle is damaged: an array of shape {shape} without its content")
        super().__setstate__((1, shape, kind.dtype, is_fortran, content))  # type: ignore[arg-type]  # text of Python 2, too


def _empty_array(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _array_of_buffer(content: Any, kind: _Kind, shape: Any, order: Any, axes: Any = None) -> Any:
    if axes is None:
        return np.frombuffer(content, kind.dtype).reshape(shape, order=order)
    return np.frombuffer(content, kind.dtype).reshape(shape).transpose(axes)


def _scalar(kind: _Kind, content: Any) -> Any:
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, kind.dtype, count=1)[0]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise PoseError(f"the pickle asks for the encoding {encoding[:40]!r}: only arrays are read")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _class_of_arrays() -> None:
    raise PoseError("the pickle makes an array without its content")


# All that numpy arrays are pickled with, in every protocol and by every version of numpy and Python, and what replaces
# it here: the functions of numpy would allocate whatever a file claims.
_GLOBALS = {
    (f"{core}.{module}", name): function
    for core in ("numpy.core", "numpy._core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _empty_array),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _array_of_buffer),
    )
} | {
    ("numpy", "ndarray"): _class_of_arrays,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; anything else that a pickle names could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise PoseError(
                f"the pickle asks for {f'{module}.{name}'[:80]!r}: only arrays and plain containers are read"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise PoseError("the pickle asks for an object outside of it: only arrays and plain containers are read")
