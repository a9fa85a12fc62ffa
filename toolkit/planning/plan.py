"""What a run will need, item by item: a pure function of a resolved run, the hardware and the longest clips.

Beside it the seconds of a step by a stated model of the hardware (``hardware.py``), to compare DeepSpeed JSONs.

Nothing is downloaded, no weight is made and no GPU is needed. What the JSONs of one recipe share (the model, its traced
passes) is a :class:`~toolkit.planning.subject.Subject`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.planning import hardware as machine
from toolkit.planning.costs.counts import Weight, weights_of_rank
from toolkit.planning.costs.storages import Part, Peak
from toolkit.planning.costs.tracing import Trace
from toolkit.planning.costs.zero import BYTES, Items, ZeroMemory, before_split, zero_memory
from toolkit.planning.hardware import CUBLAS_WORKSPACE, FRAGMENTS, MEASURED_ROWS, PROCESS, Hardware
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Passes, Workload, with_smaller_evaluation
from toolkit.recipe.batches import num_micro_batches
from toolkit.recipe.compilation import compilation
from toolkit.recipe.deepspeed.cells import parameter_precision
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.tree import Tree, value_at

CHECKPOINT_BYTES = 12  # a trained weight in a checkpoint: master copy and two moments
SUM_BYTES = 12  # that pass through memory as a gradient is added to the sum of earlier passes
PHASES = ("start", "step", "evaluation", "save")


@dataclass(frozen=True)
class Plan:
    """One recipe under one DeepSpeed JSON on one hardware; all sizes in bytes.

    Attributes:
        deepspeed: name of the JSON.
        micro_batch_size: clips of the largest forward pass.
        accumulation_steps: forward passes of a step.
        items: of a rank's device, in the moment when most is there.
        moment: which moment that is.
        phases: the most that each phase takes, the context included.
        host: of a node's memory, by all its ranks.
        pinned: of that, page-locked.
        nvme: of a node's disk.
        checkpoint: one checkpoint on the shared disk.
        zero: DeepSpeed's items.
        pass_: a forward and backward pass over the largest micro-batch.
    """

    deepspeed: str
    micro_batch_size: int
    accumulation_steps: int
    items: Items
    moment: str
    phases: Items
    host: float
    pinned: float
    nvme: float
    checkpoint: float
    zero: ZeroMemory
    pass_: Trace

    @property
    def total(self) -> float:
        """Bytes of a device at most."""
        return sum(self.items.values())

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` will say.

        Without the context, the allocator's fragments, and what graphs keep, which torch counts as reserved.
        """
        pool = self.items.get("pool of CUDA graphs", 0.0)
        return self.total - self.items["CUDA context"] - self.items["allocator"] - pool

    @property
    def needs(self) -> Items:
        """What it needs of a GPU's memory, of a node's memory and of its disk."""
        return {"GPU memory": self.total, "host memory": self.host, "NVMe": self.nvme}

    def lacking(self, hardware: Hardware) -> Items:
        """What of ``needs`` the hardware has too little of, and how many bytes it lacks; empty where the run fits."""
        has = {"GPU memory": hardware.gpu_memory, "host memory": hardware.host_memory, "NVMe": hardware.nvme or 0}
        missing = {name: self.needs[name] - size for name, size in has.items() if size is not None}
        return {name: size for name, size in missing.items() if size > 0}


def passes_of(resolved: ResolvedRun, micro_batch_size: int | None, checkpointing: bool | None) -> tuple[int, int, bool]:
    """Clips of a micro-batch, micro-batches of a step, and whether activations are recomputed; None = the recipe's."""
    training = resolved.recipe.training
    clips = micro_batch_size or resolved.micro_batch_size
    accumulation = num_micro_batches(training.global_batch_size, resolved.data_parallel_size, clips)
    return clips, accumulation, resolved.recomputes if checkpointing is None else checkpointing


def make_plan(
    subject: Subject,
    resolved: ResolvedRun,
    hardware: Hardware,
    workload: Workload,
    *,
    micro_batch_size: int | None = None,
    checkpointing: bool | None = None,
) -> Plan:
    """Plan a run.

    Args:
        subject: of the run's recipe.
        resolved: decides the placement.
        hardware: where it is to run; its number of GPUs is ``resolved.world_size``.
        workload: the longest clips.
        micro_batch_size, checkpointing: instead of the recipe's.
    """
    recipe, config = resolved.recipe, resolved.deepspeed
    clips, accumulation, recompute = passes_of(resolved, micro_batch_size, checkpointing)
    weights = weights_of_rank(subject.weights, resolved.tensor_parallel_size)
    zero = zero_memory(weights, recipe, config, resolved.data_parallel_size)
    first = _heaviest(subject, workload.first_shapes or [(clips, workload.frames, workload.tokens)], config, recompute)
    later = _heaviest(
        subject, workload.later_shapes or [(clips, workload.later_frames, workload.tokens)], config, recompute
    )
    has_graphs = compilation(recipe, config, has_gpu=True).graphs
    workspaces = (3 if has_graphs or recipe.evaluation.graphs else 2) * CUBLAS_WORKSPACE
    if has_graphs:
        # Passes of a shape that is new run as they are written beside it, before they are captured.
        zero = zero.with_graphs(first.peak_with_gradients)
    # Before it trains, a rank measures how fast its GPU multiplies, by one thread, beside states that have no moments
    # yet.
    product = {
        "product that measures the GPU": 3.0 * MEASURED_ROWS**2 * _product_size(config),
        "cuBLAS workspaces": float(CUBLAS_WORKSPACE),
    }
    copies = max(product, {"zeros": zero.starting}, key=lambda items: sum(items.values()))
    start = zero.at_start | copies
    always = zero.always
    moments: dict[str, Items] = {
        "start": start,
        "first micro-batch": _in_pass(zero, first, is_first=True),
        "gradient reduction": always
        | {"gathered weights": zero.gathered, "gradients": zero.kept_gradients + zero.gradients}
        | {"buckets": zero.kept_buckets + zero.buckets + zero.reduction}
        | {"activations": zero.early * first.saved},
        "update": always | {"gradients": zero.kept_gradients + zero.gradients, "copies of the update": zero.update},
        "evaluation": always,
        "save": zero.in_save,
    }
    if accumulation > 1:
        moments["later micro-batches"] = _in_pass(zero, later, is_first=False)
    if resolved.tensor_parallel_size > 1:
        moments["splitting of layers"] = before_split(subject.weights, recipe, config)
    moments = {
        name: _complete(items if name == "start" else items | {"cuBLAS workspaces": float(workspaces)}, hardware)
        for name, items in moments.items()
    }
    moments["evaluation"] = _evaluation(subject, config, hardware, workload, zero, workspaces)
    largest = max(moments, key=lambda name: sum(moments[name].values()))
    of_step = [name for name in moments if name not in PHASES]
    phases = {name: sum(moments[name].values()) for name in PHASES if name in moments}
    phases["step"] = max(sum(moments[name].values()) for name in of_step)
    ranks = hardware.ranks_per_node
    trained = sum(item.numel for item in subject.weights if item.trained)  # a checkpoint holds all parts
    return Plan(
        deepspeed=recipe.deepspeed,
        micro_batch_size=clips,
        accumulation_steps=accumulation,
        items=moments[largest],
        moment=largest,
        phases={name: phases[name] for name in PHASES},
        host=ranks * (PROCESS + zero.host),
        pinned=ranks * zero.pinned,
        nvme=ranks * zero.nvme,
        checkpoint=trained * CHECKPOINT_BYTES,
        zero=zero,
        pass_=first,
    )


def largest_micro_batch(
    subject: Subject,
    resolved: ResolvedRun,
    hardware: Hardware,
    workload: Workload,
    *,
    checkpointing: bool | None = None,
) -> int:
    """The most clips of a forward pass that fit, at most a rank's whole share of a step; 0 where not one does."""
    low, high = 0, -(-resolved.recipe.training.global_batch_size // resolved.data_parallel_size)
    while low < high:
        middle = (low + high + 1) // 2
        plan = make_plan(subject, resolved, hardware, workload, micro_batch_size=middle, checkpointing=checkpointing)
        low, high = (low, middle - 1) if plan.lacking(hardware) else (middle, high)
    return low


def _evaluation(
    subject: Subject, config: Tree, hardware: Hardware, workload: Workload, zero: ZeroMemory, workspaces: int
) -> Items:
    """What an evaluation holds; generation batches that are chosen are halved until they fit."""
    while True:
        translation = subject.translation(config, workload, graphs=subject.recipe.evaluation.graphs)
        items = zero.in_save | {
            "generation": translation.working,
            "gathered weights": zero.whole,
        }
        items |= {"cuBLAS workspaces": float(workspaces)}
        needed = sum(_complete(items, hardware).values())
        if zero.whole > zero.gathered and needed > hardware.gpu_memory:
            # Then ranks generate in step, and gather layer by layer.
            translation = subject.translation(config, workload)
            items |= {"gathered weights": zero.gathered, "generation": translation.cache + translation.scores}
        items = _complete(items, hardware)
        if subject.recipe.evaluation.batch_frames != "auto" or sum(items.values()) <= hardware.gpu_memory:
            return items
        smaller = with_smaller_evaluation(workload)
        if smaller is None:
            return items
        workload = smaller


def _product_size(config: Tree) -> float:
    """Bytes of a number in the type in which the run multiplies."""
    return BYTES["bf16" if value_at(config, "torch_autocast.enabled") else parameter_precision(config)]


def _heaviest(subject: Subject, shapes: Sequence[Passes], config: Tree, checkpointing: bool) -> Trace:
    """The passes over the micro-batch that takes most."""
    return max((subject.trace(*shape, config, checkpointing) for shape in shapes), key=lambda trace: trace.peak)


def _in_pass(zero: ZeroMemory, trace: Trace, *, is_first: bool) -> Items:
    """The most of a forward and backward pass; its buckets come with the first gradient of a weight."""
    before = 0.0 if is_first else zero.passed_on
    grows = zero.keeps_gradients if is_first else zero.keeps_gradients_again

    def at(part: Part, peak: Peak) -> Items:
        items = zero.in_backward(before) | {"activations": peak.alone, "unpacked weight": zero.unpacked}
        if not part.has_gradients:
            items["buckets"] = zero.kept_buckets
        elif grows:
            items["gradients"] += peak.kept - peak.alone
        return items

    return max((at(part, peak) for part, peak in trace.peaks.items()), key=lambda items: sum(items.values()))


def _complete(items: Items, hardware: Hardware) -> Items:
    """With what no tensor has; items of nothing are left out."""
    items = {name: size for name, size in items.items() if size}
    return items | {"allocator": FRAGMENTS * sum(items.values()), "CUDA context": float(hardware.context)}


@dataclass(frozen=True)
class PassSpeed:
    """What the time of a run's passes follows from, whatever their micro-batches.

    Attributes:
        flop: seconds of one of a matrix product.
        kernel: seconds that the host takes to launch one.
        host: that it takes besides in each pass, for DeepSpeed's hooks.
        waits: of a pass, in which a GPU does none of it: it reduces gradients, and waits for weights.
    """

    flop: float
    kernel: float
    host: float
    waits: float

    @classmethod
    def of(cls, resolved: ResolvedRun, weights: list[Weight]) -> PassSpeed:
        """Of a run; what ranks of a tensor-parallel group send within a layer is not counted."""
        low = resolved.precision != "fp32" or resolved.autocast
        own = weights_of_rank(weights, resolved.tensor_parallel_size)
        share = sum(item.numel for item in own) / sum(item.numel for item in weights)
        flop = share / (machine.FLOPS * (1.0 if low else machine.FP32_SHARE))
        if compilation(resolved.recipe, resolved.deepspeed, has_gpu=True).graphs:
            return cls(flop, 0.0, 0.0, 0.0)  # a graph is one launch, and its replay runs no hooks
        # Stages 0 and 1 sum gradients once a step, the others in every backward pass: half of that is the host's work.
        reductions = gradient_tensors(weights) * machine.HOOK_SECONDS / 2 if resolved.zero_stage >= 2 else 0.0
        gathers = 3 * len(weights) / 2 * machine.GATHER_SECONDS if resolved.zero_stage == 3 else 0.0
        return cls(flop, machine.KERNEL_SECONDS, reductions, reductions + gathers)

    def products(self, passed: Trace) -> float:
        """Seconds of the matrix products of a forward and backward pass."""
        return passed.flops * self.flop

    def seconds(self, passed: Trace) -> float:
        """Of the pass: its products, or what the host does meanwhile, whichever takes longer."""
        return max(self.products(passed), passed.kernels * self.kernel + self.host) + self.waits


def step_seconds(plan: Plan, resolved: ResolvedRun, hardware: Hardware, weights: list[Weight]) -> float:
    """How long an optimizer step takes: its passes, and what is beside them."""
    passes = plan.accumulation_steps
    of_passes = passes * PassSpeed.of(resolved, weights).seconds(plan.pass_)
    return of_passes + seconds_beside(plan, passes, resolved, hardware, weights)


def seconds_beside(plan: Plan, passes: int, resolved: ResolvedRun, hardware: Hardware, weights: list[Weight]) -> float:
    """What a step of so many passes takes besides: sums, what ranks send, what crosses the host link, the update."""
    zero = plan.zero
    trained = sum(item.numel for item in weights if item.trained)
    sums = (passes - 1) * SUM_BYTES * trained / machine.MEMORY_BANDWIDTH
    bandwidth = machine.NODE_BANDWIDTH if hardware.nodes == 1 else machine.NETWORK_BANDWIDTH
    communication = (zero.sent + (passes - 1) * zero.sent_again) / bandwidth
    link = zero.over_link * (1 if resolved.zero_stage < 3 else passes) / machine.HOST_LINK
    on_disk = 2 * plan.nvme / machine.NVME_BANDWIDTH
    if zero.host and not (zero.master or zero.moments):
        update = zero.of_optimizer * hardware.ranks_per_node / machine.HOST_ADAM
    else:
        update = zero.of_optimizer / machine.MEMORY_BANDWIDTH
    return sums + communication + link + on_disk + update


def gradient_tensors(weights: Sequence[Weight]) -> int:
    """Parameters that train: each has its hook in the backward pass."""
    return sum(item.trained for item in weights)
