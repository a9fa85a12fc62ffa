"""Forward and backward passes of micro-batches as CUDA graphs: one for each shape, replayed into gradients that stay.

DeepSpeed's hooks are Python, which a replay does not run. So gradients are computed without them and summed over the
micro-batches of a step in memory that is allocated once. DeepSpeed then gets each sum as if backward passes had left it
there, and reduces it over ranks once: where it is called, or at stage 1 where `coalesce_grad_reduction` ends.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.batching.collate import Batch
from toolkit.cluster.memory_shortage import in_short, is_out_of_memory
from toolkit.decoding.step_graphs import Capture, capture_on, on_stream, stream_of_graphs
from toolkit.recipe.compilation import compilation
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.optimization.gradient_reduction import coalesced_reduction

MOST_GRAPHS = 128  # a ladder has at most 96 shapes for one number of clips each, and some for the end of an epoch
ROOM = 1.25  # of the inputs, over those of the largest batch so far: the next one may be a little larger

log = logging.getLogger("toolkit")
# Token loss and CTC loss of a micro-batch, summed, in nats, by a model.
Losses = Callable[[Batch, Any], tuple[Tensor, Tensor]]
# Both passes of a micro-batch: its losses [2]. Where they fail, they have added nothing to the gradient.
Passes = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class _Graph:
    """The passes of one shape.

    Attributes:
        batch: what it reads.
        losses: token loss and CTC loss [2], which it writes.
        replay: runs it.
    """

    batch: Batch
    losses: Tensor
    replay: Callable[[], None]


class PassGraphs:
    """The passes of a run's steps on one rank, without a CTC head; where there are no graphs, they run as written.

    Attributes:
        out_of_memory: whether a capture has failed for lack of memory.
    """

    def __init__(self, engine: Any, losses: Losses) -> None:
        self.engine, self.losses = engine, losses
        self.capture: Capture | None = capture_on(engine.device)
        self.out_of_memory = False
        # All passes run on it: autograd sums each gradient on the stream that its leaf was first used on, and a graph
        # that was captured on one stream must not wait for another.
        self.stream = stream_of_graphs() if engine.device.type == "cuda" else None
        self.weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
        self.leaves = _Leaves(engine.module)
        self.sums = _sums(engine, self.weights)
        self.scale = torch.zeros((), device=engine.device)
        self.graphs: dict[tuple[Any, ...], _Graph] = {}
        self.inputs: dict[tuple[str, torch.dtype], Tensor] = {}  # memory that all graphs read
        self.is_first_step = True  # whose passes are watched by hooks

    def backward(
        self,
        batches: Iterable[Batch],
        scale: Tensor,
        compute: Callable[[Passes, Batch], Iterable[Tensor]],
        around: Callable[[Batch], AbstractContextManager[None]],
    ) -> Tensor:
        """Passes of one step; afterwards the engine has its gradient, reduced over ranks.

        Args:
            batches: on the device.
            scale: factor of the losses, one number on the device.
            compute: computes a micro-batch by its passes, whole or in parts, and gives the losses of each part.
            around: a context for the passes of a micro-batch or a part of one.

        Returns:
            token loss and CTC loss of all, summed, in nats: float64 [2].
        """
        engine = self.engine
        found: list[Tensor] = []

        def passes(batch: Batch) -> Tensor:
            with around(batch):
                return self._pass(batch)

        # Other optimizers of stage 1 reduce as their hooks run, except within a coalesced reduction.
        waits = engine.zero_optimization_stage() == 1 and not _has_own_sums(engine)
        if waits:
            engine.optimizer.clear_backward_seen_flag()  # as the engine's forward pass does
        with coalesced_reduction(engine) if waits else nullcontext():
            with on_stream(self.stream), nullcontext() if self.is_first_step else self.leaves.in_place():
                torch._foreach_zero_(self.sums)
                self.scale.copy_(scale)
                for batch in batches:
                    found += compute(passes, batch)
            _hand_over(engine, self.weights, self.sums)
        engine.set_gradient_accumulation_boundary(True)
        if not waits and engine.enable_backward_allreduce:
            engine.allreduce_gradients()
        self.is_first_step = False
        return torch.stack(found).double().sum(0)

    def _pass(self, batch: Batch) -> Tensor:
        key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(batch).items())
        if key not in self.graphs:
            if not self.is_first_step and self.capture is not None and len(self.graphs) < MOST_GRAPHS:
                self._add(key, batch)
            if key not in self.graphs:
                return self._written(batch)
        graph = self.graphs[key]
        losses = torch.empty_like(graph.losses)  # before the replay: nothing may fail once it has added its gradient
        for name, tensor in _tensors(batch).items():
            getattr(graph.batch, name).copy_(tensor)
        graph.replay()
        return losses.copy_(graph.losses)

    def _written(self, batch: Batch) -> Tensor:
        """Both passes without a graph; where memory is short, in that of all graphs, too."""
        try:
            return self._run(batch)
        except RuntimeError as error:
            if not (self.graphs and is_out_of_memory(error)):
                raise
            said = in_short(error)
        # The error and its traceback are gone, and with them the tensors of the pass.
        self.capture, self.out_of_memory = None, True
        self.graphs.clear()
        self.inputs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        log.warning("all passes run without CUDA graphs from here on, whose memory was needed: %s", said)
        return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        """Both passes; the gradient is added to the sums, as the last of all."""
        nll, ctc = self.losses(batch, self._model)
        # Hooks watch the weights themselves in the first step.
        leaves = self.weights if self.is_first_step else self.leaves.all
        with warnings.catch_warnings():
            # DeepSpeed's hooks of the weights belong to another stream than this one: the first step may wait for it.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
            gradients = torch.autograd.grad(nll * self.scale, leaves, allow_unused=True, materialize_grads=True)
        losses = torch.stack([nll.detach(), ctc.detach()])
        torch._foreach_add_(self.sums, gradients)
        return losses

    def _model(self, **inputs: Any) -> Any:
        """The model as the engine runs it, without the engine's hooks."""
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        with autocast_if_enabled(self.engine):
            return self.engine.module(**inputs)

    def _add(self, key: tuple[Any, ...], batch: Batch) -> None:
        """Capture the passes of a shape; where that fails no more are captured. Sums and random numbers stay."""
        scale = self.scale.clone()
        self.scale.zero_()  # a capture runs the passes, too: it adds nothing
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                assert self.capture is not None
                copies: dict[str, Any] = {name: self._copy(name, tensor) for name, tensor in _tensors(batch).items()}
                # All labels are scored, those that do not count for nothing: their number differs from batch to batch.
                own = replace(batch, **copies, labelled=torch.arange(batch.labels.numel(), device=batch.labels.device))
                losses, replay = self.capture(lambda: self._run(own))
                self.graphs[key] = _Graph(own, losses, replay)
                clips, frames = batch.frame_mask.shape
                log.info("a CUDA graph: passes of %d clips, %d frames, %d tokens", clips, frames, batch.labels.shape[1])
            except RuntimeError as error:  # of torch or CUDA, too little memory included
                # The error itself is not kept: it holds the tensors of the pass.
                self.capture, self.out_of_memory = None, is_out_of_memory(error)
                log.warning("passes of new shapes run without CUDA graphs from here on: %s", in_short(error))
        self.scale.copy_(scale)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy at the front of the memory that the graphs share; those that are there keep theirs when it grows."""
        memory = self.inputs.get((name, tensor.dtype))
        if memory is None or memory.numel() < tensor.numel():
            memory = self.inputs[name, tensor.dtype] = tensor.new_empty(math.ceil(ROOM * tensor.numel()))
        return memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


class _Leaves:
    """Other leaves of autograd in the memory of a module's trained weights.

    DeepSpeed's hooks keep what autograd knows of the weights themselves, the stream of their first use included.

    Attributes:
        all: in the order of the module's trained weights.
    """

    def __init__(self, module: nn.Module) -> None:
        found = {weight: nn.Parameter(weight.detach()) for weight in module.parameters() if weight.requires_grad}
        self.all = list(found.values())
        own = (
            (part._parameters, name, weight) for part in module.modules() for name, weight in part._parameters.items()
        )
        self._places = [(holder, name, weight, found[weight]) for holder, name, weight in own if weight in found]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the module computes with them."""
        for holder, name, _, leaf in self._places:
            holder[name] = leaf
        try:
            yield
        finally:
            for holder, name, weight, _ in self._places:
                holder[name] = weight


def pass_graphs(engine: Any, resolved: ResolvedRun, losses: Losses) -> PassGraphs | None:
    """Those of a run; None where its recipe wants none."""
    wanted = compilation(resolved.recipe, resolved.deepspeed, has_gpu=engine.device.type == "cuda")
    return PassGraphs(engine, losses) if wanted.graphs else None


def _has_own_sums(engine: Any) -> bool:
    """Whether DeepSpeed's optimizer has sums of gradients, as the one for bf16 weights at stage 1 does."""
    return hasattr(engine.optimizer, "fp32_groups_gradients")


def _sums(engine: Any, weights: list[nn.Parameter]) -> list[Tensor]:
    """Where the gradients of a step are summed, in the shapes of the weights."""
    optimizer = engine.optimizer
    if _has_own_sums(engine):
        pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        own = {id(weight): total for group in pairs for weight, total in zip(*group, strict=True)}
        return [own[id(weight)].view_as(weight) for weight in weights]
    is_beside = getattr(optimizer, "use_grad_accum_attribute", False)  # in another type than the weights'
    kind = optimizer.gradient_accumulation_dtype if is_beside else None
    return [torch.zeros_like(weight, dtype=kind, requires_grad=False) for weight in weights]


def _hand_over(engine: Any, weights: list[nn.Parameter], sums: list[Tensor]) -> None:
    """Leave the sums where backward passes would have left them."""
    optimizer = engine.optimizer
    if _has_own_sums(engine):
        optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.bf16_groups]
        return
    name = "grad_accum" if getattr(optimizer, "use_grad_accum_attribute", False) else "grad"
    for weight, gradient in zip(weights, sums, strict=True):
        # Another tensor on the same memory: DeepSpeed moves it into its buckets.
        setattr(weight, name, gradient.detach())


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """What the passes read, but for the places of labels."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    left_out = ("labelled", "clips", "is_filler", "gloss_labels")
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and name not in left_out}
