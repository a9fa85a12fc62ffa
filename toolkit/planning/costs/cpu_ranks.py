"""What a rank on a CPU holds, moment by moment: DeepSpeed 0.19.8 and this toolkit's own code of such ranks.

It differs from a rank on a GPU (``zero.py``) in this:

* Host and device are the same memory. Offloading moves nothing, and its copies come on top.
* A buffer takes memory where it is written to: of a bucket the part that gradients fill.
* Stage 1 sums gradients in place (``toolkit/cpu/communication.py``); stage 3 scatters them through gloo, which clones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.cpu import linear
from toolkit.planning.costs.counts import Weight
from toolkit.planning.costs.tracing import Trace
from toolkit.planning.costs.zero import (
    BYTES,
    ENGINE_BUCKET,
    STATE_BUFFERS,
    Items,
    ZeroMemory,
    joins_gradients,
    zero_memory,
)
from toolkit.recipe.batches import LARGEST_WHOLE_GRADIENT, NUMBERS_AT_ONCE
from toolkit.recipe.deepspeed.cells import offload_device, parameter_precision
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

SPEED_BYTES = 3 * 1024**2 * BYTES["fp32"]  # matrices of training/monitoring/flops.py


@dataclass(frozen=True)
class _Rank:
    """Bytes of a rank that several moments share.

    Attributes:
        zero: the items of ``zero.py``, as if nothing were offloaded.
        stage: of ZeRO.
        own: trained numbers that this rank updates.
        trained: trained numbers, of all ranks.
        size: of a parameter.
        accumulated: of a number of a gradient's sum.
        master: of a number of the master copy.
        filled: what gradients fill of one bucket.
        early: share of the gradients that come after a bucket was full for the first time.
        linear: share of the trained numbers that are in linear layers.
        group: trained numbers of the larger parameter group, those of the pose encoder or of the backbone.
    """

    zero: ZeroMemory
    stage: int
    own: float
    trained: float
    size: float
    accumulated: float
    master: float
    filled: float
    early: float
    linear: float
    group: float


def cpu_moments(
    weights: Sequence[Weight],
    recipe: Recipe,
    config: Tree,
    world_size: int,
    *,
    micro_batches: int,
    first: Trace,
    later: Trace,
) -> tuple[ZeroMemory, dict[str, Items]]:
    """What one rank holds in each moment, without its process.

    Args:
        weights: of the recipe's translator, with adapters.
        recipe: names optimizer, quantisation and averaging.
        config: the DeepSpeed JSON.
        world_size: number of ranks.
        micro_batches: of a step.
        first, later: passes over the largest first and later micro-batch, traced as of a CPU.

    Returns:
        the items of ``zero.py``, and those of each moment.
    """
    rank = _rank(weights, recipe, config, world_size)
    gradient = rank.trained * rank.size
    joins = rank.stage == 2 and gradient <= LARGEST_WHOLE_GRADIENT
    if joins := joins and joins_gradients(recipe, config, gradient, world_size):  # whole when the pass is over
        rank = replace(rank, filled=rank.trained * rank.size, early=0.0)
    zero, always = rank.zero, _always(rank, weights, config)
    whole = _whole_gradient(rank, world_size, micro_batches)
    adds = micro_batches > 1 and not whole
    kept = always["gradients"]
    partition = zero.kept_gradients + zero.gradients - kept  # and at stage 1 bf16 gradients, until the update is over
    sums = {"gradients": kept + partition}
    # A whole gradient goes into buckets once a step, and a partition's sum is made as its bucket is done.
    made = {"gradients": kept + rank.early * partition} if whole and rank.stage == 2 else sums
    in_pass = {"gathered weights": zero.gathered, "unpacked weight": zero.unpacked}
    moments = {
        "start": _start(rank, always),
        "first micro-batch": always | in_pass | {"activations": first.peak},
        "gradient reduction": always
        | made
        | {"activations": rank.early * later.saved, "gathered weights": rank.early * zero.gathered}
        | {"buckets": rank.filled + _reduction(rank, config, world_size, joins=joins, adds=adds)},
        "update": always | sums | {"copies of the update": _update(rank, config)},
    }
    if micro_batches > 1:
        moments["later micro-batches"] = (
            always | in_pass | {"gradients": kept + (whole or partition), "activations": later.peak}
        )
    if rank.stage == 3:
        prefetched = float(value_at(config, "zero_optimization.stage3_prefetch_bucket_size") or 5e7)
        share = min(1.0, prefetched / sum(item.numel for item in weights))
        # Weights arrive in a buffer for many, from which each is copied; it stays until all were used.
        gathered = {"gathered weights": zero.gathered + share * zero.whole}
        largest = max(item.numel for item in weights)
        if rank.size < BYTES["fp32"] and not linear.has_fast_bf16():
            in_pass["weight in fp32"] = largest * BYTES["fp32"]  # while it multiplies
        moments["forward pass"] = always | sums | in_pass | gathered | {"activations": later.saved}
    return zero, moments


def _rank(weights: Sequence[Weight], recipe: Recipe, config: Tree, world_size: int) -> _Rank:
    stage = int(value_at(config, "zero_optimization.stage") or 0)
    size = BYTES[parameter_precision(config)]
    named = value_at(config, "data_types.grad_accum_dtype")
    trained = float(sum(item.numel for item in weights if item.trained))
    bucket = float(value_at(config, "zero_optimization.reduce_bucket_size") or ENGINE_BUCKET)
    return _Rank(
        zero=zero_memory(weights, recipe, _without_offload(config), world_size, on_cpu=True),
        stage=stage,
        own=trained / (world_size if stage else 1),
        trained=trained,
        size=size,
        accumulated=BYTES[named] if named else size,
        master=size if value_at(config, "bf16.bf16_master_weights_and_grads") else BYTES["fp32"],
        filled=min(bucket, trained) * size if stage >= 2 else 0.0,
        early=max(0.0, 1 - bucket / trained) if stage >= 2 else 0.0,
        linear=sum(item.numel for item in weights if item.trained and item.linear) / trained,
        group=max(
            float(sum(item.numel for item in weights if item.trained and item.fresh is fresh))
            for fresh in (True, False)
        ),
    )


def _without_offload(config: Tree) -> Tree:
    config = copy.deepcopy(config)
    for name in ("offload_optimizer", "offload_param"):
        config.get("zero_optimization", {}).pop(name, None)
    return config


def _always(rank: _Rank, weights: Sequence[Weight], config: Tree) -> Items:
    """What is there from the first step on, between any two moments."""
    kept = rank.zero.kept_gradients
    if rank.stage == 1 and kept:
        kept = rank.trained * rank.accumulated
    always = rank.zero.always | {"gradients": kept, "buckets": rank.filled if rank.stage == 3 else 0.0}
    optimizer = offload_device(config, "optimizer")
    if not optimizer:
        return always
    # The gradient that CPUAdam reads stays. Below stage 3 the updated weights go through a copy in their own type, and
    # two buffers are as large as the largest weight.
    copies = rank.own * rank.master
    if rank.stage < 3:
        largest = max((item.numel for item in weights if item.trained), default=0)
        copies += rank.own * rank.size + 2 * largest * rank.size
    if optimizer == "nvme":
        group = _sub_group(rank, config)
        count = float(value_at(config, "zero_optimization.offload_optimizer.buffer_count") or STATE_BUFFERS)
        always |= {"master copy": 0.0, "moments": 0.0}
        copies = count * group * rank.master  # through which states, and the gradient, are read and written
    return always | {"copies of offloading": copies}


def _sub_group(rank: _Rank, config: Tree) -> float:
    """Numbers that this rank updates at once: at most those of a parameter group."""
    own = rank.own * rank.group / rank.trained
    return min(float(value_at(config, "zero_optimization.sub_group_size") or 1e9), own)


def _start(rank: _Rank, always: Items) -> Items:
    """The most until the first step, which makes the optimizer's moments."""
    weights = {name: always[name] for name in ("quantised weights", "frozen weights", "trained weights")}
    made = weights | {"copies of offloading": always.get("copies of offloading", 0.0)}
    if rank.stage:
        made["master copy"] = always["master copy"]
    if rank.stage in (1, 3):
        made["gradients"] = always["gradients"]
    variants = [made | {"measuring the processor's speed": SPEED_BYTES}]
    if rank.stage in (1, 2):
        variants.append(weights | {"weights before they are flattened": rank.zero.trained})
    if rank.stage == 2:
        variants.append(made | {"gradients": rank.own * rank.master})  # for a moment
    if rank.stage == 3:  # each master copy is converted, and then cloned
        variants.append(weights | {"master copy": 2 * always["master copy"]})
    return max(variants, key=lambda items: sum(items.values()))


def _whole_gradient(rank: _Rank, world_size: int, micro_batches: int) -> float:
    """The gradient that a rank sums by itself before all do (``training/optimization/gradient_reduction.py``)."""
    whole = rank.trained * rank.size
    sums = rank.stage >= 2 and world_size > 1 and micro_batches > 1 and rank.size == BYTES["fp32"]
    return whole if sums and whole <= LARGEST_WHOLE_GRADIENT else 0.0


def _joined(rank: _Rank, config: Tree, world_size: int) -> float:
    """Copies beside whole gradients, each of which leaves as it is copied into the bucket of its parameter group."""
    bucket = min(float(value_at(config, "zero_optimization.reduce_bucket_size") or ENGINE_BUCKET), rank.group)
    moving = min(NUMBERS_AT_ONCE, bucket) * rank.size
    if rank.size < BYTES["fp32"]:
        return moving  # partitions in fp32 are there from the first micro-batch on
    in_bf16 = rank.linear if value_at(config, "torch_autocast.enabled") and linear.has_fast_bf16() else 0.0
    return max(moving, in_bf16 * bucket * BYTES["bf16"], (1 - in_bf16) * bucket * rank.size / world_size)


def _reduction(rank: _Rank, config: Tree, world_size: int, *, joins: bool, adds: bool) -> float:
    """Copies while gradients are summed over ranks; ``joins`` = many at a time, ``adds`` = to an earlier sum."""
    if rank.stage == 0:
        return min(ENGINE_BUCKET, rank.trained) * rank.size if world_size > 1 else 0.0
    if rank.stage == 1:
        return 0.0
    if rank.stage == 3:
        # Partitions in the order of ranks, gloo's clone of them, and this rank's share in the type of the sum.
        return rank.filled * (2 + rank.accumulated / rank.size / world_size)
    if joins:
        return _joined(rank, config, world_size)
    copies = rank.filled  # all gradients of a bucket in one tensor
    if value_at(config, "torch_autocast.enabled"):
        # Each type that is sent has a bucket, one after the other. Those of nn.Linear are sent in bf16, from one more
        # copy; without fast bf16 the toolkit's own layers are there instead, and DeepSpeed knows them not.
        in_bf16 = rank.linear if linear.has_fast_bf16() else 0.0
        copies *= max(in_bf16 * (1 + BYTES["bf16"] / rank.size), 1 - in_bf16)
    # In the type of the parameters this rank's partition is a tensor for each micro-batch.
    return copies + (rank.own * rank.size if adds and rank.accumulated == rank.size else 0.0)


def _update(rank: _Rank, config: Tree) -> float:
    """Copies while the optimizer steps."""
    if rank.stage == 3 and not offload_device(config, "optimizer"):
        return _sub_group(rank, config) * rank.master
    if rank.stage == 2 and rank.accumulated == rank.size:
        return rank.own * rank.master
    return 0.0
