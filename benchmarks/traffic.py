"""What kernels of a GPU compute and move: FLOPs and bytes of each, counted where they are called, and the time that a
chip needs for them at least.

An operator reads each tensor that it gets once and writes each that it makes once; an embedding reads the rows that it
looks up. So does a kernel that Inductor has made. Products have the FLOPs of torch's own formulas. A context manager,
for a process on the pretended CUDA runtime (tests/pretended_cuda), which calls what a GPU would be asked for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from operator_calls import OWNERS, WITHOUT_KERNEL
from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from toolkit.cluster.devices import own_device

# NVIDIA's data sheets of the H100 SXM and the H200 SXM: dense products, bytes of HBM a second.
# https://www.nvidia.com/en-us/data-center/h100/ and /h200/, whose 1,979 TFLOPS of bf16 are with sparsity.
FLOPS = {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12}  # fp32 without TF32, as torch's
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}
SHORTEST = 3e-6  # seconds of a kernel that hardly does anything, from its start to the start of the next; assumed
# Their first argument is written without being read.
OVERWRITING = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_"}
# Of the table that they read, as many elements as they return; of that which they write, as many as they are given.
LOOKING_UP = {"embedding", "index_select", "gather", "index"}
PUTTING = {"scatter_", "scatter_add_", "index_add_", "index_put_", "_index_put_impl_"}
OWN = ("benchmarks/traffic.py", "benchmarks/traffic_side.py")  # are to blame for nothing
# They read nothing of the tensor whose type and device they take.
MAKING = {"new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like", "rand_like", "randn_like"}


@dataclass
class Work:
    """What calls of one kernel at one place do together."""

    calls: int = 0
    flops: float = 0.0
    model_flops: float = 0.0  # without those of a recomputed forward pass
    bytes: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BANDWIDTH, 0.0))  # at least, by chip

    def add(self, flops: float, is_again: bool, moved: float, dtype: torch.dtype) -> None:
        self.calls += 1
        self.flops += flops
        self.model_flops += 0.0 if is_again else flops
        self.bytes += moved
        for chip, bandwidth in BANDWIDTH.items():
            self.seconds[chip] += max(flops / FLOPS.get(dtype, FLOPS[torch.float32]), moved / bandwidth, SHORTEST)


class Traffic:
    """Counts while it is entered, on a kind of device: the rank's own, unless it gets another.

    Attributes:
        work: (place, kernel) -> what its calls do; a place is a file and a function, of a backward pass that whose
            gradient is computed.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device or own_device().type
        self.work: dict[tuple[str, str], Work] = {}
        self._places: dict[int, str] = {}  # of nodes of autograd, by their sequence numbers
        self._mode = _Mode(self)
        launched = CachingAutotuner.run

        def run(kernel: Any, *inputs: Any, **settings: Any) -> Any:
            moved = sum(_bytes(tensor) * (2 if "in_out" in name else 1) for name, tensor in _named(kernel, inputs))
            self.note(kernel.fn.__name__, 0.0, moved, torch.float32)
            with _disable_current_modes():  # the first launch tries several ways
                return launched(kernel, *inputs, **settings)

        self._launches = mock.patch.object(CachingAutotuner, "run", run)

    def __enter__(self) -> Traffic:
        self._mode.__enter__()
        self._launches.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._launches.__exit__(*error)
        self._mode.__exit__(*error)

    def place(self) -> tuple[str, bool]:
        """Where Python is, or where that was called whose gradient is computed; whether a pass is recomputed."""
        node = torch._C._current_autograd_node()
        is_again = node is not None and torch.is_grad_enabled()
        if node is None or is_again:
            place = _place()
            self._places[torch.autograd._get_sequence_nr() - 1] = place
            return place, is_again
        return f"{self._places.get(node._sequence_nr(), node.name())}, backward", False

    def note(self, kernel: str, flops: float, moved: float, dtype: torch.dtype) -> None:
        """Note one call."""
        place, is_again = self.place()
        self.work.setdefault((place, kernel), Work()).add(flops, is_again, moved, dtype)

    def seen(self) -> dict[str, Any]:
        """All of it, for an answer."""
        rows = [
            {"place": place, "kernel": kernel, "calls": work.calls, "flops": work.flops, "bytes": work.bytes}
            | {f"seconds_{chip}": seconds for chip, seconds in work.seconds.items()}
            for (place, kernel), work in self.work.items()
        ]
        return {"rows": rows, "model_flops": sum(work.model_flops for work in self.work.values())}


class _Mode(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled layers run as they are, and show the operators that they call

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if function.is_view or name in WITHOUT_KERNEL or function.namespace == "c10d":
            self._traffic.place()  # its gradient may need a kernel
            return result
        tensors = [*_tensors((args, kwargs)), *_tensors(result)]
        here = [tensor for tensor in tensors if tensor.device.type == self._traffic.device]
        if not here or (name in ("copy_", "_to_copy") and _crosses(tensors)):
            return result
        formula = flop_registry.get(function._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0.0
        self._traffic.note(name, flops, moved_by(function, args, kwargs, result), here[0].dtype)
        if name == "addmm" and args[0].dim() == 2:  # cuBLAS adds in place: a kernel of its own copies it there
            self._traffic.note("copy_", 0.0, _bytes(args[0]) + _bytes(result), result.dtype)
        return result


def moved_by(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Bytes that a call of an operator reads and writes."""
    schema = function._schema
    name = schema.name.split("::")[1]
    given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
    read, written = [], list(_tensors(result))
    for place, argument in enumerate(schema.arguments):
        tensors = list(_tensors(given.get(argument.name)))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_written &= not (name.startswith("_fused_") and argument.name == "grads")  # an fp16 scale alone changes them
        if is_written and not schema.returns:  # as of those over lists of tensors
            written += tensors
        if not (is_written and (argument.is_out or (place == 0 and name in OVERWRITING))):
            read += tensors
    if name in LOOKING_UP:
        read = [*read[1:], *written]
    if name in PUTTING:
        read, written = read[1:], read[-1:]
    if name in MAKING:
        read = []
    return sum(map(_bytes, _distinct(read))) + sum(map(_bytes, _distinct(written)))


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> float:
    """Bytes of the elements of a tensor; those that it repeats lie in the cache."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _crosses(tensors: list[Tensor]) -> bool:
    """Whether it copies between host and GPU, by another engine than that of kernels."""
    return len({tensor.device.type for tensor in tensors}) > 1


def _named(kernel: Any, inputs: Any) -> Iterator[tuple[str, Tensor]]:
    pairs = zip(kernel.fn.arg_names, inputs, strict=False)
    return ((name, value) for name, value in pairs if isinstance(value, Tensor))


def _place() -> str:
    """The innermost function of a package that is to blame."""
    frame: Any = sys._getframe(2)
    while frame:
        path = frame.f_code.co_filename
        owner = next((name for name in OWNERS if f"/{name}/" in f"{path}/"), None)
        if owner and not path.endswith(OWN):
            start = f"{path}/".rindex(f"/{owner}/") + 1
            return f"{path[start:]} {frame.f_code.co_qualname}"  # a line would be another after the next change
        frame = frame.f_back
    return threading.current_thread().name
