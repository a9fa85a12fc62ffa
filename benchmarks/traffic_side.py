#!/usr/bin/env python
"""``training_side.py`` for ``roofline.py``: ``traffic 4`` orders four steps whose kernels are counted.

Weights hold nothing, neither random numbers nor what a copy would write: pages that are never written take no memory
of the host, not even those of T5-3B.
"""

from __future__ import annotations

from typing import Any

import torch
import turns
from torch import Tensor
from traffic import Traffic

LARGE = 2**20  # elements of a tensor
copied = Tensor.to


@torch.compiler.allow_in_graph
def in_graph(tensor: Tensor, *wanted: Any, **settings: Any) -> Tensor:
    """``Tensor.to`` in a compiled layer: its compiler knows the method by its name alone."""
    return copied(tensor, *wanted, **settings)


def empty_copy(tensor: Tensor, *wanted: Any, **settings: Any) -> Tensor:
    """``Tensor.to``; of a large tensor of the host without its numbers."""
    if torch.compiler.is_compiling():
        return in_graph(tensor, *wanted, **settings)
    if tensor.device.type != "cpu" or tensor.numel() < LARGE:
        return copied(tensor, *wanted, **settings)
    like = copied(tensor.new_empty(1), *wanted, **settings)
    if (like.device, like.dtype) == (tensor.device, tensor.dtype):
        return tensor
    return torch.empty_like(tensor, device=like.device, dtype=like.dtype, requires_grad=False)


turns.WATCHES["traffic"] = Traffic
for name in ("normal_", "uniform_"):
    setattr(Tensor, name, lambda tensor, *_, **__: tensor)
Tensor.to = empty_copy  # type: ignore[method-assign]

import training_side

if __name__ == "__main__":
    training_side.main()
