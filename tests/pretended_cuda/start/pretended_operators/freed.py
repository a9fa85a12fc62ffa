"""Whether what a graph reads is still there: memory outside the graphs' pools that was freed since the capture."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pretended_operators import runtime

STACK = 14  # lines of the operator's callers


def check_of(operator: Any, read: list[Tensor]) -> Callable[[], None]:
    """What a replay of a captured operator asks first; it does nothing unless PRETENDED_CUDA_FREED is on."""
    if not runtime.setting("PRETENDED_CUDA_FREED", "0"):
        return lambda: None
    outside = [
        (StorageWeakRef(tensor.untyped_storage()), tuple(tensor.shape))
        for tensor in read
        if tensor.device.type == "cuda" and tensor.numel() and not _is_of_graphs(tensor)
    ]
    stack = "".join(traceback.format_stack(limit=STACK))

    def check() -> None:
        for storage, shape in outside:
            if storage.expired():
                raise RuntimeError(f"{operator} of a graph reads freed memory {shape}; it was captured at\n{stack}")

    return check


def _is_of_graphs(tensor: Tensor) -> bool:
    """Whether it lies in a pool of graphs, which keeps the memory of what has no tensor any more."""
    place = tensor.data_ptr()
    pools = (part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0))
    return any(part["address"] <= place < part["address"] + part["total_size"] for part in pools)
