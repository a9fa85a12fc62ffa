"""Bytes that a forward and backward pass holds, traced on the meta device through the code that trains.

Tensors on the meta device have shapes and no memory, so a pass of any size takes about a second. Every storage that an
operation makes counts from then until Python or autograd drops it (``storages.py``). Encoder and decoder keep three
layers each; what one between others adds (``watching.py``) is multiplied by the layers that were left out. For ranks on
CPUs fake tensors say that they are on a CPU, so that its own layers run. Where torch has other kernels on a GPU than on
the meta device (attention, dropout, autocast), stand-ins keep what those kernels keep (``kernels.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from toolkit.cpu.layers import use_cpu_layers
from toolkit.models.backbone import halves, layer_list, set_checkpointing
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.gpu_layers import FlatFeedForward, use_gpu_layers
from toolkit.models.loss import CPU_SCORES, GPU_SCORES, translation_losses
from toolkit.models.translator import PoseTranslator
from toolkit.planning.costs.counts import PACKED
from toolkit.planning.costs.kernels import PackedLinear, as_on_cpu, as_on_gpu
from toolkit.planning.costs.storages import Part, Peak, Storages
from toolkit.planning.costs.watching import BEHIND, MIDDLE, Layer, Stack, watching

LAYERS = 3  # that are traced of each stack: one between two others adds what each further one would
# What torch raises where a model reads values, which tensors without memory do not have.
UNTRACEABLE = (
    NotImplementedError,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True)
class Trace:
    """One forward and backward pass of the whole model over a micro-batch.

    Attributes:
        saved: bytes that wait for the backward pass when the loss is known.
        peaks: most bytes at once in its parts, inputs, saved and temporary tensors; with gradients in the type of the
            weights where they are kept.
        kernels: operations that compute something.
        flops: of its matrix products, recomputation included.
        bf16_products: its different matrix products in bf16: operator, shapes and strides.
    """

    saved: float
    peaks: dict[Part, Peak]
    kernels: float
    flops: float
    bf16_products: frozenset[object] = frozenset()

    @property
    def peak(self) -> float:
        """Most bytes at once; gradients of weights leave as they come."""
        return max((peak.alone for peak in self.peaks.values()), default=0.0)

    @property
    def peak_with_gradients(self) -> float:
        """Most bytes at once; gradients of weights are kept until the end."""
        return max((peak.kept for peak in self.peaks.values()), default=0.0)


@dataclass
class TracedModel:
    """A model on the meta device whose stacks were shortened.

    Attributes:
        model: has few layers in encoder and decoder.
        left_out: how many layers of encoder and decoder were removed.
    """

    model: PoseTranslator
    left_out: tuple[int, int]


def shorten(model: PoseTranslator) -> TracedModel:
    """Remove all but the first layers of encoder and decoder; changes ``model``."""
    _pack(model)
    left_out = []
    for stack in halves(model.backbone):
        layers = layer_list(stack) if stack is not None else nn.ModuleList()
        left_out.append(max(0, len(layers) - LAYERS))
        if left_out[-1]:
            del layers[LAYERS:]
    return TracedModel(model, (left_out[0], left_out[1]))


def trace(
    traced: TracedModel,
    *,
    clips: int,
    frames: int,
    tokens: int,
    dtype: torch.dtype,
    autocast: bool = False,
    checkpointing: bool = False,
    ctc_weight: float = 0.0,
    gathers: bool = False,
    compiled: Collection[str] = (),
    on_cpu: bool = False,
) -> Trace:
    """Trace one micro-batch.

    Args:
        traced: from :func:`shorten`.
        clips, frames, tokens: of the micro-batch, padding included.
        dtype: of the parameters.
        autocast: whether matrix products of fp32 parameters are computed in bf16.
        checkpointing: whether layers are recomputed in the backward pass.
        ctc_weight: of the recipe.
        gathers: whether layers get their weights when they run (ZeRO stage 3), so that none can be joined before.
        compiled: of "encoder" and "decoder" those whose layers run compiled, on a GPU.
        on_cpu: whether the rank is on a CPU.
    """
    model = traced.model
    fake = FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else None
    traced = replace(
        traced, model=_faked(model, dtype, fake) if fake else _with_gpu_layers(model, dtype, gathers, compiled)
    )
    model = traced.model
    model.train()
    set_checkpointing(model.backbone, checkpointing)
    config = model.config
    device = torch.device("cpu" if on_cpu else "meta")
    mode = fake or nullcontext()
    with mode, device:
        shapes = config.input_shapes(clips, frames)
        inputs: dict[str, Any] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        labels = torch.empty(clips, tokens, dtype=torch.int64)
        labelled = torch.empty(clips * tokens, dtype=torch.int64)
        special = torch.empty(3, dtype=torch.int64)
    live = Storages([*model.parameters(), *model.buffers()])
    kernels = as_on_cpu(autocast) if on_cpu else as_on_gpu(autocast)
    with mode, kernels as end_forward, watching(model, live) as stacks, live:
        for tensor in (*inputs.values(), labels, labelled):
            live.add(tensor)
        nll, ctc = translation_losses(
            model,
            **inputs,
            labels=labels,
            labelled=labelled,
            special_ids=special,
            label_smoothing=0.1,
            scores_at_once=CPU_SCORES if on_cpu else GPU_SCORES,
        )
        loss = nll + ctc_weight * ctc
        end_forward()
        saved = live.live
        live.region = "scores"
        torch.autograd.backward(loss)
    return _extrapolate(traced, stacks, live, saved)


def _pack(model: PoseTranslator) -> None:
    """Let layers whose weights are held in int8 or NF4 keep what those of bitsandbytes keep."""
    for module in model.modules():
        if hasattr(module, PACKED):
            module.__class__ = PackedLinear
            module.keeps_input = getattr(module, PACKED).kind == "int8"


def _packed_types(model: PoseTranslator) -> dict[nn.Module, torch.dtype]:
    """The types in which packed layers multiply, where it is another than that of their input."""
    packed = {module: getattr(module, PACKED) for module in model.modules() if hasattr(module, PACKED)}
    return {module: TORCH_DTYPES[by.compute_dtype] for module, by in packed.items() if by.kind == "nf4"}


def _with_gpu_layers(
    model: PoseTranslator, dtype: torch.dtype, gathers: bool, compiled: Collection[str]
) -> PoseTranslator:
    """A copy with the layers of a GPU."""
    model = copy.deepcopy(model).to(dtype)
    for module, kind in _packed_types(model).items():
        module.to(kind)
    use_gpu_layers(model)
    for name, stack in zip(("encoder", "decoder"), halves(model.backbone), strict=True):
        for module in stack.modules() if stack is not None and name in compiled else ():
            if isinstance(module, FlatFeedForward):
                module.counts_as_compiled = True
    if gathers:
        for module in model.modules():
            module.register_forward_pre_hook(_gathered)
    return model


def _gathered(*_: Any) -> None:
    """Stands for DeepSpeed's hook before a module."""


def _faked(model: PoseTranslator, dtype: torch.dtype, mode: FakeTensorMode) -> PoseTranslator:
    """A copy with the layers of a CPU, whose parameters and buffers are fake tensors there."""
    model = copy.deepcopy(model)
    use_cpu_layers(model)
    types = _packed_types(model)
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    kept = [*model.parameters(), *model.buffers()]  # no identity is given twice
    with mode:
        for module in model.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                setattr(module, name, fake(tensor, types.get(module, dtype)))
    del kept
    return model


def _extrapolate(traced: TracedModel, stacks: tuple[Stack, Stack], live: Storages, saved: int) -> Trace:
    """The figures of the whole model from those of the shortened one."""
    layers = [stack.layer() if number else Layer() for number, stack in zip(traced.left_out, stacks, strict=True)]
    left_out = list(zip(traced.left_out, layers, strict=True))
    encoder, decoder = (number * layer.saved for number, layer in left_out)
    of_encoder, of_decoder = (
        number * _gradients(stack) for number, stack in zip(traced.left_out, halves(traced.model.backbone), strict=True)
    )
    both = encoder + decoder
    # What the layers that were left out hold while a part computes, and the gradients that their backward passes have
    # left by then; those of the layer that stands for them run one after the other.
    beside = {
        "scores": [(both, 0)],
        "decoder": [(both, 0)],
        "decoder" + MIDDLE: [(both, 0), (encoder, of_decoder)],
        "decoder" + BEHIND: [(encoder, of_decoder)],
        "words": [(encoder, of_decoder)],
        "encoder": [(encoder, of_decoder)],
        "encoder" + MIDDLE: [(encoder, of_decoder), (0, of_decoder + of_encoder)],
        "encoder" + BEHIND: [(0, of_decoder + of_encoder)],
        "pose encoder": [(0, of_decoder + of_encoder)],
    }
    peaks = {
        part: Peak(
            max(peak.alone + held for held, _ in beside[part.region]),
            max(peak.kept + held + part.has_gradients * gradients for held, gradients in beside[part.region]),
        )
        for part, peak in live.peaks.items()
    }
    return Trace(
        saved=saved + encoder + decoder,
        peaks=peaks,
        kernels=float(live.kernels + sum(number * layer.kernels for number, layer in left_out)),
        flops=live.flops + sum(number * layer.flops for number, layer in left_out),
        bf16_products=frozenset(live.bf16_products),
    )


def _gradients(stack: nn.Module | None) -> int:
    """Bytes of the gradients of a layer."""
    layers = layer_list(stack) if stack is not None else ()
    return sum(weight.nbytes for layer in layers[-1:] for weight in layer.parameters() if weight.requires_grad)
