"""Counts what code asks of the device: operator calls, and reads that make the host wait for a GPU.

It counts on any device, also where there is no GPU: every tensor stands for one on the GPU. A context manager.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import functional
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
# Operators that start no kernel, beside those that torch calls views.
WITHOUT_KERNEL = {
    *("_unsafe_view", "_reshape_alias", "detach", "empty", "empty_like", "new_empty", "empty_strided"),
    *("record_stream", "set_", "resize_"),
}
HOST = "toolkit/batching/collate.py"  # makes batches, which are the host's own
OWNERS = (HOST, "deepspeed", "torch/optim", "accelerate", "toolkit", "transformers", "benchmarks", "tests")


class Calls:
    """Counts operator calls and waits while it is entered.

    Attributes:
        operators: how often each operator was called.
        kernels: how many of these calls start a kernel, which views and empty tensors do not.
        waits: how often the host waits for a GPU: (package, function that asks, what it asks), to a number. torch's
            optimizers keep their step count on the host; they read it without waiting.
    """

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.kernels = 0
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self._modes = (_Functions(self), _Operators(self))
        # On a CPU DeepSpeed's wait for its device does nothing.
        self._synchronize = mock.patch.object(
            type(get_accelerator()), "synchronize", lambda *_: self.wait("synchronize")
        )

    @property
    def total(self) -> int:
        return sum(self.operators.values())

    def waits_of(self, *packages: str) -> int:
        return sum(count for (package, _, _), count in self.waits.items() if package in packages)

    def __enter__(self) -> Calls:
        for entered in (*self._modes, self._synchronize):
            entered.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for entered in reversed((*self._modes, self._synchronize)):
            entered.__exit__(*error)

    def wait(self, what: str) -> None:
        """Note a wait, with the innermost function of a package that is to blame."""
        frame: Any = sys._getframe(2)
        while frame:
            path = frame.f_code.co_filename
            owner = next((name for name in OWNERS if f"/{name}/" in f"{path}/"), None)
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
        self._calls.kernels += not (function.is_view or function._schema.name.split("::")[1] in WITHOUT_KERNEL)
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        context.save_for_backward(query, key, value, mask)
        return query.new_zeros((*query.shape[:3], value.shape[-1]))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(context.saved_tensors, context.needs_input_grad, strict=True)
        return tuple(torch.zeros_like(tensor) if wanted else None for tensor, wanted in needed)


@contextmanager
def calls_of_a_gpu() -> Iterator[None]:
    """Within it attention, dropout and T5's normalisation are single calls, as they are on a GPU and not on a CPU.

    Attention and normalisation compute something else: what is measured is what the host does.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        return _Attention.apply(query, key, value, attn_mask)

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def norm(input: Tensor, shape: Any, weight: Tensor, epsilon: float) -> Tensor:
        return functional.layer_norm(input, shape, weight, None, epsilon)  # one call each way, as its kernel on a GPU

    with mock.patch.multiple(functional, scaled_dot_product_attention=attention, dropout=dropout, rms_norm=norm):
        yield
