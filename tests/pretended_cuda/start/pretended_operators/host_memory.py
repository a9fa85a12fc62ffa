"""Tensors of a pretended GPU as tensors of the CPU in the same memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


def on_host(value: Any) -> Any:
    """The same elements as a tensor of the CPU, which keeps no memory; anything but a tensor of a GPU as it is."""
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    if storage.nbytes() == 0:
        found = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    else:
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        found = torch.empty(0, dtype=value.dtype)
        found.set_(whole, value.storage_offset(), value.shape, value.stride())
    if value.is_conj():
        found = found.conj()
    return torch._neg_view(found) if value.is_neg() else found


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU in new memory of a GPU."""
    new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if value.numel():
        on_host(new).copy_(value)
    return new


def extent(value: Tensor) -> tuple[int, int]:
    """Where the elements of a tensor lie: first byte, and bytes to the end of the last one."""
    if value.numel() == 0:
        return value.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), (last + 1) * value.element_size()
