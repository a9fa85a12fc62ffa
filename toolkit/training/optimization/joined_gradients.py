"""Gradients at ZeRO stages 1 and 2, moved into this rank's partition many at a time, where a rank holds them whole.

DeepSpeed moves each by itself: into a bucket, into its partition and into one tensor for the optimizer, and it computes
the norm of each. That is 20 operator calls for every parameter, and one or two here. What is sent stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.recipe.batches import NUMBERS_AT_ONCE

FLUSH = "_flush_coalesced_reduction_zero12"  # the engine's method that moves them one by one


@dataclass(frozen=True)
class _Bucket:
    """Parameters whose gradients are sent together.

    Attributes:
        weights: in the order in which their gradients lie in the bucket.
        elements: of all.
        sent_as: the type in which they are summed over ranks.
        own: what of the bucket belongs to this rank: (first element in the bucket, in the partition, elements).
    """

    weights: list[nn.Parameter]
    elements: int
    sent_as: torch.dtype
    own: list[tuple[int, int, int]]


def join_gradients(engine: Any) -> None:
    """Have the engine move gradients together at the end of its coalesced reductions, where it can."""
    if not _can_join(engine):
        return
    optimizer = engine.optimizer
    groups = [list(_buckets(optimizer, index)) for index in range(len(optimizer.bit16_groups))]
    setattr(engine, FLUSH, lambda _: reduce_joined(optimizer, groups))


def joins_gradients(engine: Any) -> bool:
    """Whether :func:`join_gradients` has found that it can."""
    return FLUSH in vars(engine)


def _can_join(engine: Any) -> bool:
    optimizer = engine.optimizer
    # Sums in fp32: of weights in fp32, or of weights in bf16 with a master copy, which only stage 2 has here.
    types = [torch.float32, *([torch.bfloat16] if engine.zero_optimization_stage() == 2 else [])]
    return (
        engine.zero_optimization_stage() in (1, 2)
        and hasattr(optimizer, "_coalesce_grad_reduction")  # not the optimizer for bf16 weights, which has own sums
        and optimizer.dtype in types
        and optimizer.gradient_accumulation_dtype == torch.float32 == optimizer.master_weights_and_grads_dtype
        and not (optimizer.cpu_offload or optimizer.zenflow or optimizer.overlap_comm or optimizer.has_moe_layers)
        # Settings of the DeepSpeed JSON that change how gradients are averaged, or where they lie.
        and optimizer.reduce_scatter
        and optimizer.gradient_average
        and not any(map(any, optimizer.round_robin_bit16_padding))
        and not any(getattr(weight, "use_muon", False) for group in optimizer.bit16_groups for weight in group)
        and not engine.is_deepcompile_active()
    )


def _buckets(optimizer: Any, index: int) -> Iterator[_Bucket]:
    """Those of a parameter group: by the type in which they are sent, and of at most ``reduce_bucket_size``.

    A single rank, which sends nothing, has smaller ones: each is a copy where gradients are added to earlier ones.
    """
    import deepspeed.comm as dist

    group, size = optimizer.real_dp_process_group[index], optimizer.partition_size[index]
    is_alone = dist.get_world_size(group) == 1
    start = dist.get_rank(group) * size
    by_type: dict[torch.dtype, list[tuple[nn.Parameter, int]]] = {}
    offset = 0
    for weight in optimizer.round_robin_bit16_groups[index]:
        kind = optimizer.dtype if is_alone else optimizer.get_param_comm_dtype(weight)
        by_type.setdefault(kind, []).append((weight, offset))
        offset += weight.numel()
    largest = NUMBERS_AT_ONCE if is_alone else optimizer.reduce_bucket_size
    for kind, members in by_type.items():
        for some in _portions(members, [weight.numel() for weight, _ in members], largest):
            own, place = [], 0
            for weight, offset in some:
                first, end = max(offset, start), min(offset + weight.numel(), start + size)
                if first < end:
                    own.append((place + first - offset, first - start, end - first))
                place += weight.numel()
            yield _Bucket([weight for weight, _ in some], place, kind, _merged(own))


def _merged(own: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ranges that follow each other in both places, as one."""
    merged: list[tuple[int, int, int]] = []
    for source, target, numel in own:
        if merged:
            before, place, length = merged[-1]
            if (source, target) == (before + length, place + length):
                merged[-1] = before, place, length + numel
                continue
        merged.append((source, target, numel))
    return merged


def _portions(items: Sequence[Any], sizes: Sequence[int], largest: float) -> Iterator[list[Any]]:
    """Consecutive items, together of at most the largest size, unless one alone is larger."""
    portion: list[Any] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if portion and total + size > largest:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += size
    if portion:
        yield portion


@torch.no_grad()
def reduce_joined(optimizer: Any, groups: Sequence[Sequence[_Bucket]]) -> None:
    """Average the gradients over ranks, and leave each rank its partition as DeepSpeed's step expects it.

    Those of weights in bf16 are added to what earlier calls of the same step have left.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    for index, buckets in enumerate(groups):
        own, before = optimizer.params_in_partition[index], optimizer.averaged_gradients.pop(index, None)
        earlier = before.flat_partition if before is not None and optimizer.dtype == torch.bfloat16 else None
        del before
        partition = _partition(optimizer, index, buckets, earlier)
        # DeepSpeed computes the norm of each of these, in fp64, and of as many as there are parameters.
        parts = max(1, min(len(own), math.ceil(partition.numel() / NUMBERS_AT_ONCE)))
        chunks = partition.split(max(1, math.ceil(partition.numel() / parts)))
        optimizer.averaged_gradients[index] = GradPartitionBufferGroup(chunks, partition)
    optimizer._release_ipg_buffers()  # of passes outside a coalesced reduction


def _partition(optimizer: Any, index: int, buckets: Sequence[_Bucket], earlier: Tensor | None) -> Tensor:
    """This rank's partition of a group's averaged gradients [elements], added to an earlier one; zeros as padding."""
    import deepspeed.comm as dist

    size, device = optimizer.partition_size[index], optimizer.bit16_groups_flat[index].device
    world_size = dist.get_world_size(optimizer.real_dp_process_group[index])
    partition = torch.empty(size, dtype=torch.float32, device=device) if earlier is None else earlier
    for bucket in buckets:
        if world_size == 1 and earlier is None:  # which sends nothing
            for _, target, numel in bucket.own:
                _take(bucket, partition[target : target + numel])
            continue
        gradients = torch.empty(bucket.elements, dtype=optimizer.dtype, device=device)
        _take(bucket, gradients)
        if world_size > 1:
            gradients = gradients.div_(world_size).to(bucket.sent_as)
            dist.all_reduce(gradients, group=optimizer.dp_process_group)
        for source, target, numel in bucket.own:
            place, part = partition[target : target + numel], gradients[source : source + numel]
            place.copy_(part) if earlier is None else place.add_(part)
    if earlier is None:
        partition[sum(numel for bucket in buckets for _, _, numel in bucket.own) :].zero_()
    return partition


def _take(bucket: _Bucket, memory: Tensor) -> None:
    """Move the gradients of a bucket into memory [elements], and zeros for parameters without one."""
    places = memory.split([weight.numel() for weight in bucket.weights])
    pairs = list(zip(bucket.weights, places, strict=True))
    for some in _portions(pairs, [weight.numel() for weight in bucket.weights], NUMBERS_AT_ONCE):
        for weight, place in some:
            if weight.grad is None:
                place.zero_()
        found = [(place, weight.grad.flatten()) for weight, place in some if weight.grad is not None]
        if found:
            torch._foreach_copy_([place for place, _ in found], [gradient for _, gradient in found])
        del found
        for weight, _ in some:
            weight.grad = None
