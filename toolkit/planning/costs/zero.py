"""What DeepSpeed 0.19.8 allocates on a rank for weights, gradients and optimizer, item by item and phase by phase.

Read off its optimizers: none at stage 0 with fp32 weights, ``BF16_Optimizer`` at stage 1 with bf16 weights and fp32
accumulation, ``stage_1_and_2.py`` and ``stage3.py`` otherwise. Which item is there when:

* *weights, master copy, moments, average*: always.
* *gradients*: between the first backward pass of a step and its update; always where DeepSpeed keeps a buffer for them.
* *buckets*: in the backward pass; always at stage 3.
* *reduction*: copies while gradients are summed over ranks, when the activations are gone.
* *update*: copies while the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.planning.costs.blocks import in_blocks
from toolkit.planning.costs.counts import Weight
from toolkit.recipe.batches import LARGEST_WHOLE_GRADIENT, NUMBERS_AT_ONCE
from toolkit.recipe.deepspeed.cells import offload_device, parameter_precision
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

Items = dict[str, float]

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
# A weight and its share of the scales: one per row in int8; one per 64 weights in NF4, itself packed (Dettmers et al.
# 2023, section 3: 0.127 bits a weight).
PACKED_BYTES = {"int8": 1.0, "nf4": (4 + 0.127) / 8}
# Moments of an optimizer, in numbers per trained number, and the bytes of each.
MOMENTS = {"adamw": (2, 4.0), "adamw8bit": (2, 1.0), "lion": (1, 4.0), "muon": (1, 4.0), "adafactor": (0, 4.0)}
# DeepSpeed's engine sums gradients in buckets of so many numbers where no ZeRO optimizer does.
ENGINE_BUCKET = 500_000_000
# Buffers through which NVMe is read and written, unless the JSON says how many: of a sub-group of optimizer states, and
# of a parameter; and the numbers in one for a parameter.
STATE_BUFFERS, PARAMETER_BUFFERS, PARAMETER_BUFFER = 4, 5, 100_000_000


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of one rank.

    Attributes:
        trained, frozen, packed: weights on the device, by kind.
        gathered: whole weights that stage 3 holds at once beside its partition.
        whole: all weights, which stage 3 gathers for an evaluation.
        single: the largest of the weights, which stage 3 gathers one by one to save them.
        replaced: copies of the trained weights while their average stands in their place.
        master, moments, average: of the optimizer, on the device.
        kept_gradients: always on the device.
        gradients: on the device from the first backward pass of a step to its update.
        passed_on: of them, those that are there when a later pass of the step begins.
        keeps_gradients, keeps_gradients_again: whether the gradients of a step's first pass, and of a later one, are
            whole until it ends.
        graph_pool: what CUDA graphs of training passes keep from one step to the next, on the device.
        kept_buckets, buckets: for communication, always or in the backward pass.
        reduction, update: copies in these moments, on the device.
        starting: copies while the optimizer is made, on the device.
        early: the share of a backward pass that is left when gradients are reduced for the first time.
        unpacked: the largest quantised weight, unpacked while it is used.
        host: in the host's memory.
        pinned: of that, page-locked.
        nvme: on the disk.
        unexplained: on the device beside gradients; measured, and by nothing in DeepSpeed's source.
        sent: bytes that the rank sends in a step with one micro-batch; ``sent_again`` with each further one.
        over_link: bytes between device and host in a step.
        of_optimizer: bytes that the update reads and writes, wherever they are.
    """

    trained: float = 0.0
    frozen: float = 0.0
    packed: float = 0.0
    gathered: float = 0.0
    whole: float = 0.0
    single: float = 0.0
    replaced: float = 0.0
    master: float = 0.0
    moments: float = 0.0
    average: float = 0.0
    kept_gradients: float = 0.0
    gradients: float = 0.0
    passed_on: float = 0.0
    keeps_gradients: bool = False
    keeps_gradients_again: bool = False
    graph_pool: float = 0.0
    kept_buckets: float = 0.0
    buckets: float = 0.0
    reduction: float = 0.0
    update: float = 0.0
    starting: float = 0.0
    early: float = 0.0
    unpacked: float = 0.0
    host: float = 0.0
    pinned: float = 0.0
    nvme: float = 0.0
    unexplained: float = 0.0
    sent: float = 0.0
    sent_again: float = 0.0
    over_link: float = 0.0
    of_optimizer: float = 0.0

    @property
    def always(self) -> Items:
        """What is on the device from the start of a run to its end."""
        return {
            "quantised weights": self.packed,
            "frozen weights": self.frozen,
            "trained weights": self.trained,
            "master copy": self.master,
            "moments": self.moments,
            "weight average": self.average,
            "gradients": self.kept_gradients,
            "buckets": self.kept_buckets,
            "pool of CUDA graphs": self.graph_pool,
        }

    @property
    def at_start(self) -> Items:
        """What is on the device before the first step, which makes moments and averages."""
        return self.always | {"moments": 0.0, "weight average": 0.0, "pool of CUDA graphs": 0.0}

    @property
    def in_save(self) -> Items:
        """What is on the device while a model is saved; a checkpoint needs no more than is always there."""
        return self.always | {"gathered weights": self.single, "weights that the average replaces": self.replaced}

    @property
    def states(self) -> Items:
        """What is on the device in a backward pass, without activations: the model states and DeepSpeed's buffers."""
        return self.in_backward(self.gradients)

    @property
    def device(self) -> float:
        """Bytes of the model states."""
        return sum(self.states.values())

    def with_graphs(self, activations: float) -> ZeroMemory:
        """The same where passes are CUDA graphs whose largest one has so many bytes of activations.

        They include the gradients of a micro-batch until these are added up. The sums stay where they are, and are
        there from the start.
        """
        kept = self.kept_gradients or self.gradients  # an optimizer with sums of its own has those alone
        return replace(
            self, kept_gradients=kept, gradients=0.0, passed_on=0.0, keeps_gradients_again=True, graph_pool=activations
        )

    def in_backward(self, gradients: float) -> Items:
        """What is on the device in a backward pass, with the gradients that earlier passes of the step left there."""
        return self.always | {
            "gathered weights": self.gathered,
            "gradients": self.kept_gradients + gradients,
            "buckets": self.kept_buckets + self.buckets,
            "not explained": self.unexplained if gradients else 0.0,
        }


def zero_memory(
    weights: Sequence[Weight], recipe: Recipe, config: Tree, world_size: int, *, on_cpu: bool = False
) -> ZeroMemory:
    """What one rank holds.

    Args:
        weights: of the recipe's translator, with adapters.
        recipe: names optimizer, quantisation and averaging.
        config: the DeepSpeed JSON, resolved or not.
        world_size: number of ranks.
        on_cpu: whether the ranks are on CPUs.
    """
    stage = int(value_at(config, "zero_optimization.stage") or 0)
    size = BYTES[parameter_precision(config)]
    held = sum if on_cpu or offload_device(config, "param") else in_blocks
    lean = bool(value_at(config, "bf16.bf16_master_weights_and_grads"))
    named = value_at(config, "data_types.grad_accum_dtype")
    accumulated = BYTES[named] if named else size
    quantization = recipe.model.quantization
    each = PACKED_BYTES[quantization.kind] if quantization else size
    unpacked = BYTES[quantization.compute_dtype] if quantization and quantization.kind == "nf4" else 0.0
    trained = sum(item.numel for item in weights if item.trained)
    largest = max((item.numel for item in weights if item.trained), default=0)
    apart = [item.numel for item in weights if not item.trained and not item.packed]  # trained ones are one tensor
    frozen = sum(apart)
    packed = sum(item.numel for item in weights if item.packed)
    numbers, moment = MOMENTS[recipe.training.optimizer]
    if value_at(config, "bf16.bf16_optimizer_states"):
        moment = min(moment, BYTES["bf16"])
    own = trained / (world_size if stage else 1)  # numbers that this rank updates
    master_size = size if lean else BYTES["fp32"]
    memory = ZeroMemory(
        trained=trained * size,
        frozen=held(numel / (world_size if stage == 3 else 1) * size for numel in apart),
        packed=packed * each,
        unpacked=max((item.numel for item in weights if item.packed), default=0) * unpacked,
        master=own * master_size,
        moments=own * numbers * moment,
        average=own * BYTES["fp32"] if recipe.training.ema else 0.0,
        replaced=own * master_size if recipe.training.ema else 0.0,
        of_optimizer=own * (2 * master_size + 2 * numbers * moment + BYTES["fp32"]),
    )
    bucket = float(value_at(config, "zero_optimization.reduce_bucket_size") or 5e8)
    types = 2 if value_at(config, "torch_autocast.enabled") else 1  # of what is communicated: each has its bucket
    buckets, filled = bucket * size * types, min(bucket, trained) * size
    early = max(0.0, 1 - bucket / trained) if stage >= 2 and trained else 0.0
    offloaded = offload_device(config, "optimizer")
    # A single rank has nothing to sum (`gradient_reduction.skip_sums_of_one_rank`).
    engine_bucket = min(ENGINE_BUCKET, trained) if world_size > 1 else 0.0
    if stage == 0:
        memory = _stage_0(memory, trained, size, engine_bucket)
    elif stage == 1 and size == BYTES["bf16"] and accumulated == BYTES["fp32"] and not offloaded:
        memory = replace(
            memory,
            kept_gradients=trained * accumulated,
            gradients=trained * size,
            keeps_gradients=True,
            keeps_gradients_again=True,  # they are added to the sums when a pass is over
            reduction=engine_bucket * (accumulated + size),
        )
    elif stage < 3:
        memory = _stage_1_or_2(memory, trained, own, size, accumulated, master_size, partitioned=stage == 2)
        memory = replace(memory, starting=own * master_size)  # a gradient of zeros, for the optimizer to begin with
        if joins_gradients(recipe, config, trained * size, world_size):
            # Gradients are whole until a pass is over, and then copied bucket by bucket.
            widest = bucket if world_size > 1 else max(NUMBERS_AT_ONCE, largest)
            # Of a single rank that sums in their own type each goes straight into the partition.
            copied = 0.0 if world_size == 1 and size == accumulated else min(widest, trained)
            memory = replace(
                memory,
                keeps_gradients=True,
                keeps_gradients_again=size < accumulated,
                reduction=(trained + copied) * size,
            )
        else:
            memory = replace(memory, buckets=buckets, reduction=memory.reduction + filled, early=early)
    else:
        adapted = bool(recipe.model.lora or quantization)  # then a model's folder holds what trains alone
        memory = _stage_3(memory, config, weights, world_size, size, accumulated, adapted=adapted)
        # Joined in one tensor, which is scattered, and this rank's share in the type of its sums.
        reduction = filled + (filled / size / world_size * accumulated if accumulated != size else 0.0)
        memory = replace(memory, kept_buckets=buckets, reduction=reduction, early=early)
    memory = _sent(memory, stage, trained * size, (trained + frozen) * size + packed * each, world_size)
    memory = _offloaded(memory, config, stage, own, size, master_size, largest * size)
    if world_size == 1 and not offload_device(config, "param"):
        # The partition is the weight (partition_parameters.py, NoGatherHandle), but those that are saved are copied.
        memory = replace(memory, gathered=0.0, whole=0.0)
    return memory


def joins_gradients(recipe: Recipe, config: Tree, gradient: float, world_size: int) -> bool:
    """Whether gradients of stages 1 and 2 move many at a time (``training/optimization/joined_gradients.py``).

    Stage 2 does where a rank may hold its whole ``gradient``, in bytes (``gradient_reduction.when_reduced``).
    """
    stage, precision = value_at(config, "zero_optimization.stage"), parameter_precision(config)
    accumulated = value_at(config, "data_types.grad_accum_dtype") or precision
    may_be_whole = gradient <= LARGEST_WHOLE_GRADIENT or (precision == "fp32" and world_size == 1)
    return (
        ((precision == "fp32" and stage == 1) or (precision in ("fp32", "bf16") and stage == 2 and may_be_whole))
        and accumulated == "fp32"
        and not value_at(config, "bf16.bf16_master_weights_and_grads")
        and recipe.training.optimizer != "muon"
        and not offload_device(config, "optimizer")
        and not value_at(config, "zero_optimization.overlap_comm")
    )


def before_split(weights: Sequence[Weight], recipe: Recipe, config: Tree) -> Items:
    """What a rank holds before AutoTP splits the layers: all weights, of which it then keeps its parts."""
    memory = zero_memory(weights, recipe, config, world_size=1)
    return {"weights before they are split": memory.trained + memory.frozen}


def _stage_0(memory: ZeroMemory, trained: float, size: float, bucket: float) -> ZeroMemory:
    """No ZeRO: fp32 weights are updated in place; others have a whole fp32 copy, and their gradients too."""
    if size == BYTES["fp32"]:
        memory = replace(memory, master=0.0, reduction=bucket * size)
    else:
        memory = replace(memory, update=trained * BYTES["fp32"])
    return replace(memory, gradients=trained * size, passed_on=trained * size, keeps_gradients=True)


def _stage_1_or_2(
    memory: ZeroMemory, trained: float, own: float, size: float, accumulated: float, master: float, *, partitioned: bool
) -> ZeroMemory:
    # In the type of the master copy gradients are summed into one flat buffer, which is also what the update reads.
    gradients = own * accumulated if partitioned else trained * max(accumulated, size)
    memory = replace(memory, gradients=gradients, passed_on=gradients, keeps_gradients=not partitioned)
    if partitioned and accumulated == BYTES["fp32"] != size:
        return memory
    return replace(memory, reduction=own * size, update=own * master)


def _stage_3(
    memory: ZeroMemory,
    config: Tree,
    weights: Sequence[Weight],
    world_size: int,
    size: float,
    accumulated: float,
    *,
    adapted: bool,
) -> ZeroMemory:
    live = float(value_at(config, "zero_optimization.stage3_max_live_parameters") or 1e9)
    group = float(value_at(config, "zero_optimization.sub_group_size") or 1e9)
    smallest = int(value_at(config, "zero_optimization.stage3_param_persistence_threshold") or 100_000)
    whole = sum(item.numel * size for item in weights if not item.packed) + memory.packed
    numbers = sum(item.numel for item in weights)
    persistent = sum(item.numel for item in weights if item.numel < smallest) * size
    own = sum(-(-item.numel // world_size) for item in weights if item.trained)
    saved = [item.numel for item in weights if item.trained or not adapted]
    return replace(
        memory,
        single=max(saved, default=0) * size,
        trained=memory.trained / world_size,
        packed=memory.packed / world_size,
        # A weight stays whole until so many others have been used: a small model is whole from forward to backward.
        gathered=max(persistent, whole * min(1.0, live / numbers)),
        whole=whole,
        master=0.0 if size == BYTES["fp32"] else memory.master,
        kept_gradients=own * accumulated,
        update=min(group, own) * BYTES["fp32"],
    )


def _offloaded(
    memory: ZeroMemory, config: Tree, stage: int, own: float, size: float, master: float, largest: float
) -> ZeroMemory:
    """Move what the JSON offloads from the device to the host's memory, or to a disk.

    Below stage 3 host and device each have a buffer of the ``largest`` weight that trains, in bytes.
    """
    optimizer, parameters = offload_device(config, "optimizer"), offload_device(config, "param")
    host = pinned = nvme = over_link = 0.0
    if optimizer:
        states = memory.master + memory.moments + own * master  # and the gradient that the update reads
        buffer = largest if stage < 3 else 0.0
        # And a copy of the weights on their way back.
        held = memory.kept_gradients + (own * size + buffer if stage < 3 else 0.0)
        over_link += own * (2 * size + BYTES["fp32"])
        if optimizer == "nvme":
            group = min(float(value_at(config, "zero_optimization.sub_group_size") or 1e9), own)
            nvme, over_link = states, over_link + 2 * states
            count = float(value_at(config, "zero_optimization.offload_optimizer.buffer_count") or STATE_BUFFERS)
            states = count * group * master
        host = states + held + memory.average + memory.replaced
        pinned = host if value_at(config, "zero_optimization.offload_optimizer.pin_memory") else 0.0
        # Below stage 3 the device sums gradients in one flat buffer (stage_1_and_2.py, GradPartitionBufferGroup). A CPU
        # rank has no more, of two commits. The peak of an H100 had as much again, whose holder was not found.
        unexplained = memory.gradients if stage < 3 else 0.0
        memory = replace(
            memory,
            master=0.0,
            moments=0.0,
            average=0.0,
            replaced=0.0,
            kept_gradients=0.0,
            kept_buckets=memory.kept_buckets + buffer,
            update=0.0,
            starting=0.0,
            unexplained=unexplained,
        )
    if parameters:
        weights = memory.trained + memory.frozen + memory.packed
        over_link += 2 * memory.gathered
        if parameters == "nvme":
            nvme += weights
            count = float(value_at(config, "zero_optimization.offload_param.buffer_count") or PARAMETER_BUFFERS)
            each = float(value_at(config, "zero_optimization.offload_param.buffer_size") or PARAMETER_BUFFER)
            host, pinned = host + count * each * size, pinned + count * each * size  # always page-locked
        else:
            host += weights
            pinned += weights if value_at(config, "zero_optimization.offload_param.pin_memory") else 0.0
        memory = replace(memory, trained=0.0, frozen=0.0, packed=0.0)
    return replace(memory, host=host, pinned=pinned, nvme=nvme, over_link=over_link)


def _sent(memory: ZeroMemory, stage: int, gradients: float, weights: float, world_size: int) -> ZeroMemory:
    """What a ring of ranks sends: an all-reduce twice its bytes, a gather or a scatter once."""
    share = (world_size - 1) / world_size
    once = 2 * gradients * share
    if stage == 3:
        gathers = 2 * weights * share
        return replace(memory, sent=once + gathers, sent_again=once + gathers)
    return replace(memory, sent=once + (gradients * share if stage else 0.0), sent_again=once if stage == 2 else 0.0)
