"""The pretended runtime as Python sees it: counts of calls, captures, and nodes that are operators."""

from __future__ import annotations

import ctypes
import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# In the order of `Count` in runtime/shared.h.
NAMES = (
    *("kernels", "graph_launches", "waits", "copies", "memsets", "allocations", "blas", "dnn", "nccl", "triton"),
    *("queries", "captured", "without_numbers"),
)
Again = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
Listener = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcudart.so.13")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.pretended_record.argtypes = [pointer, Again, pointer]
    library.pretended_keep.argtypes = [pointer, pointer, size]
    library.pretended_is_capturing.argtypes = [pointer]
    library.pretended_launch.argtypes = [pointer, ctypes.c_int, ctypes.c_char_p]
    library.pretended_count.restype = ctypes.c_long
    library.pretended_listen_to_waits.argtypes = [Listener]
    library.cudaStreamSynchronize.argtypes = [pointer]
    return library


RUNTIME = _library()
RELEASED = 64  # fetched with each node that is recorded
_recorded: dict[int, Callable[[], None]] = {}
_keys = itertools.count(1)


def setting(name: str, otherwise: str) -> bool:
    """Whether a variable of the pretended runtime is on."""
    return (os.environ.get(name) or otherwise) != "0"


@contextmanager
def without_numbers() -> Iterator[None]:
    """Within it torch's own kernels, which compute nothing, are no error on this thread."""
    RUNTIME.pretended_allow(1)
    try:
        yield
    finally:
        RUNTIME.pretended_allow(-1)


def counts() -> dict[str, int]:
    """Calls of this process so far, by kind."""
    return {name: RUNTIME.pretended_count(place) for place, name in enumerate(NAMES)}


def current_stream(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))


def is_capturing(stream: int) -> bool:
    return bool(RUNTIME.pretended_is_capturing(stream))


def keep(stream: int, start: int, size: int) -> None:
    """Let the end of the stream's capture put this memory back: a capture computes nothing."""
    RUNTIME.pretended_keep(stream, start, size)


def launch(stream: int) -> None:
    """Count a kernel that has been computed.

    Raises:
        RuntimeError: the stream takes none.
    """
    _check(RUNTIME.pretended_launch(stream, NAMES.index("kernels"), None))


def wait(stream: int) -> None:
    """What a result on the host costs.

    Raises:
        RuntimeError: the stream is captured.
    """
    _check(RUNTIME.cudaStreamSynchronize(stream))


def record(stream: int, again: Callable[[], None]) -> None:
    """Let each replay of the stream's capture call a function."""
    key = next(_keys)
    _recorded[key] = again
    _forget_released()
    _check(RUNTIME.pretended_record(stream, _replay, key))


def _forget_released() -> None:
    keys = (ctypes.c_void_p * RELEASED)()
    for place in range(RUNTIME.pretended_released(keys, RELEASED)):
        _recorded.pop(keys[place], None)


@Again
def _replay(key: int) -> int:
    try:
        _recorded[key]()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _check(error: int) -> None:
    if error:
        torch.cuda.check_error(error)
