"""What a run will need, item by item: a pure function of a resolved run, the hardware and the longest clips.

Nothing is downloaded, no weight is made and no GPU is needed. What the JSONs of one recipe share (the model, its traced
passes) is a :class:`Subject`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from toolkit.errors import UserError
from toolkit.models.backbone_config import fit_dropout, fit_rows
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.tokenizers import TRAINED_VOCABULARY
from toolkit.planning.costs.counts import Weight, adapted_translator, planned_config, weights_of_rank
from toolkit.planning.costs.tracing import UNTRACEABLE, Trace, TracedModel, shorten, trace
from toolkit.planning.costs.vocabulary import planned_vocabulary
from toolkit.planning.costs.zero import BYTES, Items, ZeroMemory, before_split, zero_memory
from toolkit.planning.hardware import CUBLAS_WORKSPACE, FRAGMENTS, MEASURED_ROWS, PROCESS, Hardware
from toolkit.planning.memory import TranslationMemory, translation_memory
from toolkit.planning.workload import Passes, Workload, with_smaller_evaluation
from toolkit.recipe.batches import num_micro_batches
from toolkit.recipe.compilation import compilation
from toolkit.recipe.deepspeed.cells import parameter_precision
from toolkit.recipe.model_cards import reads_published, tokenizer_of
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Recipe
from toolkit.recipe.tree import Tree, value_at

BYTE_VOCABULARY = 384  # rows of ByT5's table
CHECKPOINT_BYTES = 12  # a trained weight in a checkpoint: master copy and two moments
PHASES = ("start", "step", "evaluation", "save")


@dataclass
class Subject:
    """A recipe's model without memory, whose passes are traced when a plan asks for them.

    Attributes:
        recipe: decides the model.
        weights: each parameter once.
        vocabulary: how a trimmed one is counted, in words; empty where it is not trimmed.
    """

    recipe: Recipe
    weights: list[Weight]
    _traced: TracedModel
    vocabulary: str = ""
    _traces: dict[tuple[object, ...], Trace] = field(default_factory=dict)
    _translations: dict[tuple[object, ...], TranslationMemory] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, rows: int | None = None) -> Subject:
        """Build the model's shapes.

        Args:
            recipe: the recipe.
            rows: tokens of a vocabulary that is made or trimmed for the run; None = the most that it may have.

        Raises:
            UserError: neither a model card nor a configuration of the backbone is here.
        """
        vocabulary = planned_vocabulary(recipe)
        rows = rows or vocabulary.rows
        config = planned_config(recipe, rows)
        fit_dropout(config, recipe.model)
        rows = rows or {"train": TRAINED_VOCABULARY, "bytes": BYTE_VOCABULARY}.get(tokenizer_of(recipe.model))
        if rows and not reads_published(recipe.model):
            fit_rows(config, rows)
        translator, weights = adapted_translator(config, recipe)
        return cls(recipe, weights, shorten(translator), vocabulary.what)

    def trace(
        self, clips: int, frames: int, tokens: int, config: Tree, checkpointing: bool, on_cpu: bool = False
    ) -> Trace:
        """A forward and backward pass over a micro-batch under a DeepSpeed JSON, on a GPU or a CPU.

        Two sizes of micro-batch are traced; figures of others lie on the line through them.
        """
        small, large = (self.traced(number, frames, tokens, config, checkpointing, on_cpu) for number in (2, 8))
        share = (clips - 2) / 6
        figures = {
            name: max(0.0, getattr(small, name) + share * (getattr(large, name) - getattr(small, name)))
            for name in ("saved", "peak", "kernels", "flops")
        }
        return Trace(**figures, bf16_products=large.bf16_products)

    def bf16_products(
        self, shapes: Iterable[tuple[int, int, int]], config: Tree, checkpointing: bool
    ) -> frozenset[object]:
        """The different matrix products in bf16 of passes over micro-batches (clips, frames, tokens) on a CPU."""
        traces = [self.traced(*shape, config, checkpointing, on_cpu=True) for shape in shapes]
        return frozenset[object]().union(*(one.bf16_products for one in traces))

    def traced(
        self, clips: int, frames: int, tokens: int, config: Tree, checkpointing: bool, on_cpu: bool = False
    ) -> Trace:
        """The same of exactly so many clips, traced where it was not yet.

        Raises:
            UserError: the model cannot be traced.
        """
        dtype = TORCH_DTYPES[parameter_precision(config)]
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # as many bytes, and no second trace
        autocast = bool(value_at(config, "torch_autocast.enabled"))
        gathers = value_at(config, "zero_optimization.stage") == 3 and not on_cpu
        key = (clips, frames, tokens, dtype, autocast, checkpointing, gathers, on_cpu)
        if key not in self._traces:
            try:
                self._traces[key] = trace(
                    self._traced,
                    clips=clips,
                    frames=frames,
                    tokens=tokens,
                    dtype=dtype,
                    autocast=autocast,
                    checkpointing=checkpointing,
                    ctc_weight=self.recipe.training.ctc_weight,
                    gathers=gathers,
                    on_cpu=on_cpu,
                )
            except UNTRACEABLE as error:
                # A model that decides by the values of tensors, which the meta device does not have.
                raise UserError(
                    f"model.backbone={self.recipe.model.backbone}: its passes cannot be traced without memory: "
                    f"{(str(error) or type(error).__name__).splitlines()[0][:120]}",
                    "plan a recipe with a similar backbone, or try small micro-batches",
                ) from error
        return self._traces[key]

    def translation(self, config: Tree, workload: Workload, *, graphs: bool = False) -> TranslationMemory:
        """The largest generation batch of an evaluation, whose steps may be CUDA graphs."""
        dtype = TORCH_DTYPES[parameter_precision(config)]
        key = (dtype, workload.evaluated, graphs)
        if key not in self._translations:
            settings = self.recipe.evaluation
            model = self._traced.model.to(dtype)  # its configuration has all layers
            self._translations[key] = max(
                (
                    translation_memory(
                        model,
                        clips=clips,
                        frames=frames,
                        beams=settings.num_beams,
                        max_new_tokens=settings.max_new_tokens,
                        graphs=graphs,
                    )
                    for clips, frames in workload.evaluated
                ),
                key=lambda memory: memory.working,
            )
        return self._translations[key]


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
    return clips, accumulation, training.gradient_checkpointing if checkpointing is None else checkpointing


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
    # Before it trains, a rank measures how fast its GPU multiplies, beside states that have no moments yet.
    product = 3.0 * MEASURED_ROWS**2 * _product_size(config)
    copies = {"product that measures the GPU": product} if product > zero.starting else {"zeros": zero.starting}
    start = zero.at_start | copies
    has_graphs = compilation(recipe, config, has_gpu=True).graphs
    workspaces = (3 if has_graphs or recipe.evaluation.graphs else 2) * CUBLAS_WORKSPACE
    if has_graphs:
        # Passes of a shape that is new run as they are written beside it, before they are captured.
        zero = zero.with_graphs(first.peak)
    always = zero.always
    moments: dict[str, Items] = {
        "start": start,
        "first micro-batch": _in_pass(zero, first.peak, gradients=0.0),
        "gradient reduction": always
        | {"gathered weights": zero.gathered, "gradients": zero.kept_gradients + zero.gradients}
        | {"buckets": zero.kept_buckets + zero.buckets + zero.reduction}
        | {"activations": zero.early * first.saved},
        "update": always | {"gradients": zero.kept_gradients + zero.gradients, "copies of the update": zero.update},
        "evaluation": always,
        "save": zero.in_save,
    }
    if accumulation > 1:
        moments["later micro-batches"] = _in_pass(zero, later.peak, gradients=zero.gradients)
    if resolved.tensor_parallel_size > 1:
        moments["splitting of layers"] = before_split(subject.weights, recipe, config)
    moments = {
        name: _complete(items, hardware, 2 * CUBLAS_WORKSPACE if name == "start" else workspaces)
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
        needed = sum(_complete(items, hardware, workspaces).values())
        if zero.whole > zero.gathered and needed > hardware.gpu_memory:
            # Then ranks generate in step, and gather layer by layer.
            translation = subject.translation(config, workload)
            items = zero.in_save | {
                "gathered weights": zero.gathered,
                "generation": translation.cache + translation.scores,
            }
        items = _complete(items, hardware, workspaces)
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


def _in_pass(zero: ZeroMemory, activations: float, gradients: float) -> Items:
    return zero.in_backward(gradients) | {"activations": activations, "unpacked weight": zero.unpacked}


def _complete(items: Items, hardware: Hardware, workspaces: int) -> Items:
    """With what no tensor of ours has; items of nothing are left out."""
    items = {name: size for name, size in items.items() if size} | {"cuBLAS workspaces": float(workspaces)}
    return items | {"allocator": FRAGMENTS * sum(items.values()), "CUDA context": float(hardware.context)}


def gradient_tensors(weights: Sequence[Weight]) -> int:
    """Parameters that train: each has its hook in the backward pass."""
    return sum(item.trained for item in weights)
