"""Copies from the host to a GPU that neither the host nor the running kernels wait for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from toolkit.batching.collate import Batch


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of these numbers, one dimension, on ``device``; the host does not wait for the copy.

    ``torch.tensor(values, device="cuda")`` waits until the GPU has done all that it was given before.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on ``device``, each copied while the one before it is used.

    On a GPU a stream of its own copies them from page-locked memory, so that the first batch of a step is copied while
    the optimizer still runs. Elsewhere nothing is copied ahead.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = _copy_stream(device)
    ahead = None
    for batch in batches:
        copied = _copy(batch, device, copying)
        if ahead:
            yield _received(*ahead, device)
        ahead = copied
    if ahead:
        yield _received(*ahead, device)


_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    """The stream that copies to ``device``, one for the whole run: memory is kept for each stream by itself."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _copy(batch: Batch, device: torch.device, copying: Any) -> tuple[Batch, Any]:
    """Begin to copy a batch; gives it and the event after which it is there."""
    pinned = batch if batch.poses.is_pinned() else batch.pin_memory()
    with torch.cuda.stream(copying):
        copied = pinned.to(device)
        return copied, copying.record_event()


def _received(batch: Batch, copied: Any, device: torch.device) -> Batch:
    """The batch, for the stream that computes: it waits for the copy, and its memory lasts until it has used it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and not value.is_cpu:
            value.record_stream(computing)
    return batch
