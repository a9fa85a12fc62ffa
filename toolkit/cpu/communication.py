"""What ranks on CPUs send each other at ZeRO stages 0 and 1.

DeepSpeed made its way for GPUs, where copies cost nothing beside the network. On CPUs they cost more than what is sent:
``benchmarks/training.py`` measures two ranks against one.
"""

from __future__ import annotations

import functools
from typing import Any

from toolkit.recipe.resolve import ResolvedRun, value_at


def communicate_on_cpu(engine: Any, resolved: ResolvedRun) -> None:
    """Spare ranks copies of all gradients and weights; results are those of DeepSpeed, or more accurate."""
    optimizer = engine.optimizer
    if resolved.zero_stage > 1 or hasattr(optimizer, "reduce_gradients"):
        return  # an optimizer that sums as the gradients come
    if resolved.world_size == 1:
        # One rank has nobody to sum with, and would still copy all gradients into one tensor and back at every step.
        engine.enable_backward_allreduce = False
    elif hasattr(optimizer, "get_grads_for_reduction") and not value_at(resolved.deepspeed, "communication_data_type"):
        engine.buffered_allreduce_fallback = functools.partial(_average_gradients, optimizer)
        optimizer.update_lp_params = functools.partial(_share_weights, optimizer)


def _average_gradients(optimizer: Any, **_: Any) -> None:
    """Average the gradients of all ranks where DeepSpeed's bf16 optimizer holds them, in fp32.

    DeepSpeed takes them to one tensor in bf16, sums there and brings them back.
    """
    import deepspeed.comm as dist

    flat_gradients, _ = optimizer.get_grads_for_reduction()
    for gradients in flat_gradients:
        # Not DeepSpeed's inference_all_reduce through shared memory: it waits for ever when a rank dies, forgets to
        # look whether all ranks are of this machine, and sums nothing from 2 GiB on.
        dist.all_reduce(gradients)
        gradients.div_(dist.get_world_size())


def _share_weights(optimizer: Any) -> None:
    """Bring this rank's part of the new weights to all ranks, each part straight to where it belongs."""
    import deepspeed.comm as dist

    for parts, own in zip(optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition, strict=True):
        parts[dist.get_rank()].data.copy_(own.data)
        for source, part in enumerate(parts):
            dist.broadcast(part.data, source)
