"""Layers of a translator that are compiled one by one, for batches of any size: fewer and larger kernels on a GPU.

A layer is a block of the pose encoder, of the backbone's encoder or of its decoder. Layers that are alike share one
graph, so that a model compiles a handful of them (a T5 has four) whatever its depth. So is the loss of many tokens;
what else is between the layers runs as it is written, and so do evaluations and searches, whose lengths change with
every token.

Gradient checkpointing keeps and recomputes whole layers, outside their graphs. Names of weights stay.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as graphs
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as gradients
from torch.fx.experimental import _config as sizes

from toolkit.models.backbone import stack_layers, stacks
from toolkit.models.loss import AS_WRITTEN, RowFunctions

BACKEND: str | Callable[..., Any] = "inductor"  # tests choose others
# Graphs of one kind of layer: with and without position biases, frozen and not, for one clip or token and for several.
GRAPHS = 64
# Scores of a vocabulary from which on the passes over them that are saved take a GPU longer than two launches its host.
SCORES = 2**24
# FLOPs of a layer's products in a forward pass, from which on its kernels take an H200 longer than its host needs
# to launch a compiled layer: guards and Triton's launches cost more than torch's own (benchmarks/launches.py).
WORTH = 4.3e10
COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)  # all of them come before anything has run

log = logging.getLogger("toolkit")


@dataclass(eq=False)
class CompiledLayers:
    """Which layers run compiled in the current forward pass; a recomputation in its backward pass does the same."""

    worth: float = 0.0  # FLOPs of a layer's products below which it runs as it is written
    works: bool = True  # until a layer cannot be compiled; the loss is not, either, from then on
    rows_work: bool = True  # until a function of the loss cannot be compiled
    is_on: bool = True  # False within `uncompiled`
    choices: dict[nn.Module, bool] = field(default_factory=dict)
    rows: RowFunctions = field(init=False)  # of the token loss

    def __post_init__(self) -> None:
        self.rows = RowFunctions(*(_rows_with_graph(written, self) for written in AS_WRITTEN))

    def begin_pass(self, *_: Any) -> None:
        self.choices.clear()

    def runs_compiled(self, layer: nn.Module, flops: float) -> bool:
        is_wanted = self.works and self.is_on and flops >= self.worth
        return layer.training and self.choices.setdefault(layer, is_wanted)

    def give_up(self, layer: nn.Module, error: Exception) -> None:
        """Run this layer without, and all others that have not run in this pass."""
        self.choices[layer] = False
        if self.works:
            self.works = False
            log.warning("layers run without compilation from here on: %s (%s)", reason_of(error), type(layer).__name__)


def layers_to_compile(model: Any) -> list[Any]:
    """The blocks of pose encoder, encoder and decoder."""
    lists = [part for part in model.pose_encoder.modules() if isinstance(part, nn.ModuleList)]
    of_poses = [layer for part in lists for layer in part]
    return [*of_poses, *(layer for stack in stacks(model.backbone) for layer in stack_layers(stack))]


def compile_layers(model: Any, *, worth: float = 0.0) -> int:
    """Have each layer of a translator compile at its first training pass; where one cannot, all run as before.

    Args:
        model: the translator.
        worth: FLOPs of a layer's products in a forward pass; batches below run as they are written.

    Returns:
        how many layers there are.
    """
    graphs.recompile_limit = max(GRAPHS, graphs.recompile_limit)
    # With its forward pass, which can be repeated without a graph; a backward pass that fails cannot.
    gradients.force_non_lazy_backward_lowering = True
    if _note_start not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_note_start)
        callback_handler.register_end_callback(_note_end)
    # Sizes that are equal by chance in the first batch, such as clips and tokens, are different ones.
    sizes.use_duck_shape = False
    # Otherwise Python compares each number that a layer has, such as a share of dropout, whenever it is called.
    graphs.specialize_float = True
    compiled = CompiledLayers(worth)
    layers = layers_to_compile(model)
    for layer in layers:
        for part in layer.modules():
            if part is not layer and getattr(part, "gradient_checkpointing", False):
                part.gradient_checkpointing = False  # T5's attention has biases require a gradient: it breaks the graph
        layer.forward = _with_graph(layer, compiled)
    model.register_forward_pre_hook(compiled.begin_pass)
    model.compiled_layers = compiled
    return len(layers)


def flops_of_vector(layer: nn.Module) -> float:
    """FLOPs of a layer's products for each vector that it gets, in a forward pass."""
    return 2.0 * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)


def _with_graph(layer: Any, layers: CompiledLayers) -> Callable[..., Any]:
    """The layer's forward pass, compiled where it can be."""
    method: Any = type(layer).forward
    is_wrapped = method.__code__.co_name == "forward_with_checkpointing"  # by transformers, around the layer's own
    written: Callable[..., Any] = MethodType(method.__wrapped__, layer) if is_wrapped else layer.forward
    compiled = torch.compile(written, fullgraph=True, dynamic=True, backend=BACKEND)
    of_vector = flops_of_vector(layer)

    def run(*inputs: Any, **settings: Any) -> Any:
        hidden = next(value for value in (*inputs, *settings.values()) if isinstance(value, torch.Tensor))
        vectors = math.prod(hidden.shape[:-1])  # one for each position, or for each landmark of it
        if layers.runs_compiled(layer, of_vector * vectors):
            try:
                return compiled(*inputs, **settings)
            except COMPILE_ERRORS as error:
                layers.give_up(layer, error)
        return written(*inputs, **settings)

    @functools.wraps(layer.forward)
    def forward(*inputs: Any, **settings: Any) -> Any:
        if is_wrapped and layer.training and layer.gradient_checkpointing:
            return layer._gradient_checkpointing_func(functools.partial(run, **settings), *inputs)
        return run(*inputs, **settings)

    return forward


def _rows_with_graph(written: Callable[..., Any], layers: CompiledLayers) -> Callable[..., Any]:
    """A function of logits and more, compiled where it can be."""
    compiled = torch.compile(written, fullgraph=True, dynamic=True, backend=BACKEND)

    @functools.wraps(written)
    def run(logits: torch.Tensor, *inputs: Any) -> Any:
        if layers.works and layers.rows_work and layers.is_on and logits.numel() >= (SCORES if layers.worth else 1):
            try:
                return compiled(logits, *inputs)
            except COMPILE_ERRORS as error:
                layers.rows_work = False
                log.warning("the loss is computed without compilation: %s (%s)", reason_of(error), written.__name__)
        return written(logits, *inputs)

    return run


def row_functions(model: nn.Module) -> RowFunctions:
    """What computes the token loss of a translator: compiled, where its layers are."""
    layers: CompiledLayers | None = getattr(model, "compiled_layers", None)
    return layers.rows if layers else AS_WRITTEN


_starts: list[float] = []  # of the compilation that runs


def _note_start(_: Any) -> None:
    _starts.append(time.monotonic())


def _note_end(_: Any) -> None:
    log.info("compiling a layer took %.1f s", time.monotonic() - _starts.pop())


@contextmanager
def before_compilations(call: Callable[[], None]) -> Iterator[None]:
    """Within it ``call`` is called whenever a layer is about to be compiled, which takes seconds."""

    def start(_: Any) -> None:
        call()

    callback_handler.register_start_callback(start)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # DeepCompile resets torch's compiler, which forgets all callbacks
            callback_handler.remove_start_callback(start)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within it forward passes begin without compiled layers; their backward passes may come later."""
    layers: CompiledLayers | None = getattr(model, "compiled_layers", None)
    if layers is None:
        yield
        return
    was_on, layers.is_on = layers.is_on, False
    try:
        yield
    finally:
        layers.is_on = was_on


def reason_of(error: Exception) -> str:
    """Why a layer could not be compiled, in one line."""
    inner = getattr(error, "inner_exception", error)
    lines = str(inner).strip().splitlines()
    # Of a process that compiles for this one: "An exception occurred in a subprocess:", and its traceback.
    said = lines[-1 if lines[0].endswith(":") else 0] if lines else ""
    return f"{type(inner).__name__}: {said.strip()}" if said else type(inner).__name__
