"""Which tensors are alive when most of them are: a log of every storage that torch's operations make (slow)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
MANY = 40  # lines


class TensorLog(TorchDispatchMode):
    """Within it storages are logged as they come and go.

    Args:
        before: tensors that were there before it, which are left out.
        ignored: ends of files whose own storages are left out, such as ``checkpointing/writer.py``.
    """

    def __init__(self, before: Iterable[torch.Tensor] = (), ignored: Sequence[str] = ()) -> None:
        super().__init__()
        self._ignored = tuple(f"{file}:" for file in ignored)
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._known: dict[int, int] = {}
        self._events: list[tuple[int, int, str]] = []  # key, bytes or -1, what made it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._add(tensor, str(func))
        return result

    def _add(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._before:
            frame, line = sys._getframe(2), ""
            while frame and not line:
                path = frame.f_code.co_filename
                if not any(part in path for part in ("/torch/", "planning_tensors")):
                    line = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
                frame = frame.f_back  # type: ignore[assignment]
            if line.startswith(self._ignored):
                self._before.add(key)
                weakref.finalize(storage, self._before.discard, key)
                return
            self._known[key] = len(self._events)
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._events.append((len(self._events), storage.nbytes(), f"{name} {dtype} {line}"))
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._events.append((self._known.pop(key), -1, ""))

    def forget(self) -> None:
        """Log from now on: what is alive stays, its coming is the first event."""
        alive = {key: self._events[number] for key, number in self._known.items()}
        self._events = []
        for key, (_, size, what) in alive.items():
            self._known[key] = len(self._events)
            self._events.append((len(self._events), size, what))

    def alive(self) -> dict[str, int]:
        """Bytes that are alive now, by what made them."""
        found: dict[str, int] = {}
        for number in self._known.values():
            _, size, what = self._events[number]
            found[what] = found.get(what, 0) + size
        return found

    def most(self) -> int:
        """The most bytes that were alive since the log began."""
        return self._peak()[0]

    def _peak(self) -> tuple[int, int]:
        """Most bytes, and the number of the event that made them so many."""
        live = most = when = 0
        sizes: dict[int, int] = {}
        for number, (key, size, _) in enumerate(self._events):
            live += size if size >= 0 else -sizes.get(key, 0)
            sizes[key] = size
            if live > most:
                most, when = live, number
        return most, when

    def at_peak(self) -> str:
        """Bytes by what made them, when most were alive; the largest first."""
        most, when = self._peak()
        alive: dict[int, tuple[int, str]] = {}
        for key, size, what in self._events[: when + 1]:
            if size < 0:
                alive.pop(key, None)
            else:
                alive[key] = (size, what)
        groups: dict[str, list[int]] = {}
        for size, what in alive.values():
            groups.setdefault(what, []).append(size)
        listed = sorted(groups.items(), key=lambda item: -sum(item[1]))[:MANY]
        lines = [f"{sum(found) / GIB:8.3f} GiB  {len(found):4} x  {what}" for what, found in listed]
        last = next(what for _, size, what in reversed(self._events[: when + 1]) if size >= 0)
        return "\n".join([f"{most / GIB:8.3f} GiB at the peak, when came {last}", *lines])
