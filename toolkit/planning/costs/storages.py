"""What operations on tensors without memory make, while a pass is traced: bytes, kernels and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Matrix products, which oneDNN computes in bf16 by a kernel for each shape; of smaller ones torch has its own code.
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
SMALLEST_PRODUCT = 16**3  # multiplications
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten._unsafe_index_put.default")


class Part(NamedTuple):
    """A part of a pass: where it is, and whether gradients of weights have come."""

    region: str
    has_gradients: bool


class Peak(NamedTuple):
    """The most bytes of a part of a pass, where gradients of weights leave as they come, and where they are kept."""

    alone: float
    kept: float


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the operations.

    Args:
        owned: the model's tensors, of which operations make views.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        super().__init__()
        self._owned = {tensor.untyped_storage()._cdata for tensor in owned}
        self.region = "pose encoder"
        self.peaks: dict[Part, Peak] = {}
        self.live = 0
        self.gradients = 0  # bytes of those of weights that have come, and are gone
        self.kernels = 0
        self.flops = 0.0
        self.bf16_products: set[object] = set()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name == "aten._local_scalar_dense.default" and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            # Models ask whether a mask hides nothing: here every batch has padding.
            return False if args[0].dtype == torch.bool else 1
        by_mask = name in INDEXING and _by_mask(args[1])
        result = _all_rows(name, args) if by_mask else func(*args, **kwargs)
        packet = func.overloadpacket
        if str(packet) in PRODUCTS and result.dtype == torch.bfloat16 and _products(args) > SMALLEST_PRODUCT:
            self.bf16_products.add((packet, *((tensor.shape, tensor.stride()) for tensor in tensors_of(args))))
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0.0
        made = [self.add(tensor) for tensor in tensors_of(result)]
        launches = any(made) or name.split(".")[1].endswith("_")
        self.kernels, self.flops = self.kernels + launches, self.flops + flops
        return result

    def add(self, tensor: Tensor) -> bool:
        """Count the storage of a tensor; whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._owned:
            return False
        self._sizes[key] = size = storage.nbytes()
        self.live += size
        self._note()
        weakref.finalize(storage, self._remove, key)
        return True

    def take_gradient(self, weight: Tensor) -> None:
        """Drop the gradient of a weight, which has come, as DeepSpeed does where it moves gradients as they come."""
        assert weight.grad is not None
        size, weight.grad = weight.grad.nbytes, None
        self.gradients += size
        self._note()

    def _note(self) -> None:
        part = Part(self.region, self.gradients > 0)
        before = self.peaks.get(part, Peak(0, 0))
        self.peaks[part] = Peak(max(before.alone, self.live), max(before.kept, self.live + self.gradients))

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors among the results, or the arguments, of an operation."""
    values = result if isinstance(result, tuple | list) else (result,)
    return [value for value in values if isinstance(value, Tensor)]


def _products(args: Any) -> int:
    """Multiplications of a matrix product, of one matrix of a batch."""
    left, right = tensors_of(args)[-2:]
    return int(left.shape[-2] * left.shape[-1] * right.shape[-1])


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _all_rows(name: str, args: Any) -> Tensor:
    """The result of indexing by a mask that is true everywhere: how many rows a real one has depends on its values."""
    values, indices = args[0], args[1]
    if name != "aten.index.Tensor":
        return values if name == "aten.index_put_.default" else torch.empty_like(values)
    mask = next(index for index in indices if index is not None)
    return values.new_empty((mask.numel(), *values.shape[mask.ndim :]))
