"""Counts what a piece of code asks of the device: operator calls, and reads that make the host wait for a GPU.

It counts on any device, also where there is no GPU: every tensor stands for one on the GPU. A context manager.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators whose result, or its size, the host must know.
READS = {
    aten._local_scalar_dense.default,  # item, and what converts to bool, int or float
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Functions that copy to the host, or from it without `non_blocking`.
COPIES = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}
OWNERS = ("deepspeed", "torch/optim", "accelerate", "toolkit", "transformers", "benchmarks", "tests")


class Calls:
    """Counts operator calls and waits while it is entered.

    Attributes:
        operators: how often each operator was called.
        waits: how often the host waits for a GPU: (package, function that asks, what it asks), to a number. torch's
            optimizers keep their step count on the host; they read it without waiting.
    """

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self._modes = (_Functions(self), _Operators(self))

    @property
    def total(self) -> int:
        return sum(self.operators.values())

    def waits_of(self, *packages: str) -> int:
        return sum(count for (package, _, _), count in self.waits.items() if package in packages)

    def __enter__(self) -> Calls:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def wait(self, what: str) -> None:
        """Note a wait, with the innermost function of a package that is to blame."""
        frame: Any = sys._getframe(2)
        while frame:
            path = frame.f_code.co_filename
            owner = next((name for name in OWNERS if f"/{name}/" in path), None)
            if owner and path != __file__:
                self.waits[owner, frame.f_code.co_name, what] += 1
                return
            frame = frame.f_back
        self.waits["other", "", what] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.operators[str(function)] += 1
        by_mask = function in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if function in READS or by_mask:
            self._calls.wait(function._schema.name.split("::")[1] + (" by a mask" if by_mask else ""))
        return function(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in COPIES:
            self._calls.wait(function.__name__)
        elif function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self._calls.wait(f"{function.__name__} with a device")
        return function(*args, **kwargs)
