"""An exponential moving average of the trainable weights, which is what gets evaluated and kept.

The average is part of the optimizer state of each shard that this rank steps, in fp32. So ZeRO partitions it like any
state, it follows the master weights, and checkpoints save it by parameter name, for any number of ranks and any stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from toolkit.checkpointing.zero_shards import rewrite_shards, shards

AVERAGE = "average"  # key in a shard's state


@torch.no_grad()
def update_average(engine: Any, decay: float, step: int) -> None:
    """Update the average after an optimizer step, at any ZeRO stage with its states in memory.

    The old average weighs ``decay``, or less during the first steps, (1 + step) / (10 + step), so that the random
    initial weights lose their influence soon. ``step`` counts from 1.
    """
    for shard in shards(engine):
        # Optimizers fill a state that is empty, so nothing may be in it before their first step.
        average = shard.state.setdefault(AVERAGE, shard.values.detach().float().clone())
        average.lerp_(shard.values.float(), 1 - min(decay, (1 + step) / (10 + step)))


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Within it the engine's weights are the averages; afterwards they are restored, bit by bit.

    All ranks must enter. Before the first step there is no average, and nothing changes.
    """
    own = [shard.values.detach().clone() for shard in shards(engine)]
    _write(engine, [shard.state.get(AVERAGE) for shard in shards(engine)])
    try:
        yield
    finally:
        _write(engine, own)


@torch.no_grad()
def _write(engine: Any, values: Sequence[torch.Tensor | None]) -> None:
    """Replace the values of every shard for which there are others."""
    for shard, new in zip(rewrite_shards(engine), values, strict=True):
        if new is not None:
            shard.values.data.copy_(new)
