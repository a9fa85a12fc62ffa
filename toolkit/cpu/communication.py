"""How ranks on CPUs exchange gradients and weights at ZeRO stages 0 and 1.

DeepSpeed copies all of them into one tensor and back, which costs little on GPUs and more than the exchange itself on
CPUs; ``benchmarks/training.py`` measures two ranks against one.
"""

from __future__ import annotations

import functools
from typing import Any

from toolkit.recipe.resolve import ResolvedRun, value_at


def communicate_on_cpu(engine: Any, resolved: ResolvedRun) -> None:
    """Exchange gradients and weights without copies; results are those of DeepSpeed, or more accurate."""
    optimizer = engine.optimizer
    if resolved.zero_stage > 1 or hasattr(optimizer, "reduce_gradients"):
        return  # an optimizer that sums as the gradients come
    if (
        resolved.data_parallel_size > 1
        and hasattr(optimizer, "get_grads_for_reduction")
        and not value_at(resolved.deepspeed, "communication_data_type")
    ):
        group = engine.data_parallel_group
        engine.buffered_allreduce_fallback = functools.partial(_average_gradients, optimizer, group)
        optimizer.update_lp_params = functools.partial(_share_weights, optimizer, group)


def _average_gradients(optimizer: Any, group: Any, **_: Any) -> None:
    """Average the gradients of all ranks in the fp32 tensors of DeepSpeed's bf16 optimizer.

    DeepSpeed copies them to one tensor in bf16, sums there and copies them back.
    """
    import deepspeed.comm as dist

    flat_gradients, _ = optimizer.get_grads_for_reduction()
    for gradients in flat_gradients:
        # Not DeepSpeed's inference_all_reduce through shared memory: it waits without end when a rank dies, does not
        # check that all ranks are on this machine, and sums nothing from 2 GiB on.
        dist.all_reduce(gradients, group=group)
        gradients.div_(dist.get_world_size(group))


def _share_weights(optimizer: Any, group: Any) -> None:
    """Broadcast each rank's partition of the new weights straight into the other ranks' weights."""
    import deepspeed.comm as dist

    for partitions, own in zip(optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition, strict=True):
        partitions[dist.get_rank(group)].data.copy_(own.data)
        for number, partition in enumerate(partitions):
            dist.broadcast(partition.data, dist.get_global_rank(group, number), group=group)
