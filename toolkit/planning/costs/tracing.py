"""Bytes that a forward and backward pass holds, traced on the meta device through the code that trains.

Tensors on the meta device have shapes and no memory, so a pass of any size takes about a second. Every storage that an
operation makes counts from then until Python or autograd drops it. Encoder and decoder keep two layers each; what their
last one adds is multiplied by the layers that were left out. For ranks on CPUs fake tensors say that they are on a CPU,
so that its own layers run. Where torch has other kernels on a GPU than on the meta
device (attention, dropout, autocast), stand-ins keep what those kernels keep (``kernels.py``).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from toolkit.cpu.layers import use_cpu_layers
from toolkit.models.backbone import halves, layer_list, set_checkpointing
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.loss import CPU_SCORES, GPU_SCORES, translation_losses
from toolkit.models.translator import PoseTranslator
from toolkit.planning.costs.counts import PACKED
from toolkit.planning.costs.kernels import PackedLinear, as_on_cpu, as_on_gpu

LAYERS = 2  # that are traced of each stack of an encoder-decoder
# What torch raises where a model reads values, which tensors without memory do not have.
UNTRACEABLE = (
    NotImplementedError,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
# Matrix products, which oneDNN computes in bf16 by a kernel for each shape; of smaller ones torch has its own code.
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
SMALLEST_PRODUCT = 16**3  # multiplications
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten._unsafe_index_put.default")


@dataclass(frozen=True)
class Trace:
    """One forward and backward pass of the whole model over a micro-batch.

    Attributes:
        saved: bytes that wait for the backward pass when the loss is known.
        peak: most bytes at once, inputs, saved and temporary tensors; gradients of weights leave at once.
        kernels: operations that compute something.
        flops: of its matrix products, recomputation included.
        bf16_products: its different matrix products in bf16: operator, shapes and strides.
    """

    saved: float
    peak: float
    kernels: float
    flops: float
    bf16_products: frozenset[object] = frozenset()


@dataclass
class TracedModel:
    """A model on the meta device whose stacks were shortened.

    Attributes:
        model: has at most ``layers`` layers in encoder and decoder.
        left_out: how many layers of encoder and decoder were removed.
        layers: that are left of each stack, at most.
    """

    model: PoseTranslator
    left_out: tuple[int, int]
    layers: int


def shorten(model: PoseTranslator) -> TracedModel:
    """Remove all but the first layers of encoder and decoder; changes ``model``."""
    _pack(model)
    left_out = []
    # A language model keeps no layer's input, which lives until its layer is done; that of the first one lives longer.
    kept = LAYERS + (halves(model.backbone)[0] is None)
    for stack in halves(model.backbone):
        layers = layer_list(stack) if stack is not None else nn.ModuleList()
        left_out.append(max(0, len(layers) - kept))
        if left_out[-1]:
            del layers[kept:]
    return TracedModel(model, (left_out[0], left_out[1]), kept)


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
        on_cpu: whether the rank is on a CPU.
    """
    model = traced.model
    fake = FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else None
    traced = replace(traced, model=_faked(model, dtype, fake) if fake else _with_gpu_layers(model, dtype, gathers))
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
    live = _Live([*model.parameters(), *model.buffers()])
    kernels = as_on_cpu(autocast) if on_cpu else as_on_gpu(autocast)
    with mode, kernels as end_forward, _watching(model, live) as marks, live:
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
        live.region, live.backward = "scores", True
        torch.autograd.backward(loss)
    return _extrapolate(traced, marks, live, saved)


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


def _with_gpu_layers(model: PoseTranslator, dtype: torch.dtype, gathers: bool) -> PoseTranslator:
    """A copy with the layers of a GPU."""
    model = copy.deepcopy(model).to(dtype)
    for module, kind in _packed_types(model).items():
        module.to(kind)
    use_gpu_layers(model)
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


@dataclass
class _Marks:
    """What was alive, launched and computed when each layer of a stack was done, in the first forward pass."""

    stacks: tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]


def _extrapolate(traced: TracedModel, marks: _Marks, live: _Live, saved: int) -> Trace:
    """The figures of the whole model from those of the shortened one."""
    of_layer = [_last_layer(stack) for stack in marks.stacks]
    encoder, decoder = (number * layer[0] for number, layer in zip(traced.left_out, of_layer, strict=True))
    # Which of the layers that were left out hold their tensors while a part of the model computes.
    held = {"pose encoder": 0, "encoder": encoder, "words": encoder} | dict.fromkeys(
        ("decoder", "scores"), encoder + decoder
    )
    kernels, flops = float(live.kernels), live.flops
    for number, layer, region in zip(traced.left_out, of_layer, ("encoder", "decoder"), strict=True):
        backward = [count / traced.layers for count in live.of_backward.get(region, (0, 0.0))]
        kernels += number * (layer[1] + backward[0])
        flops += number * (layer[2] + backward[1])
    return Trace(
        saved=saved + encoder + decoder,
        peak=max(peak + held[region] for region, peak in live.peaks.items()),
        kernels=kernels,
        flops=flops,
        bf16_products=frozenset(live.bf16_products),
    )


def _last_layer(stack: list[tuple[int, int, float]]) -> tuple[int, int, float]:
    """Bytes, operations and FLOPs that the last layer of a stack added."""
    if len(stack) < 2:
        return 0, 0, 0.0
    before, after = stack[-2:]
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


@contextmanager
def _watching(model: PoseTranslator, live: _Live) -> Iterator[_Marks]:
    """Follow which part of the model computes, forward and backward; drop gradients of weights, as DeepSpeed does."""
    encoder, decoder = halves(model.backbone)
    marks = _Marks(([], []))
    forward = {"encoder", "decoder"}  # whose first pass is not over: recomputation passes again

    def enter(region: str) -> Any:
        def hook(*_: Any) -> None:
            live.region = region

        return hook

    def starts(part: str) -> Any:
        def hook(_: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            if part in forward:
                live.region = part
                vectors = named["inputs_embeds"]
                if vectors.requires_grad:
                    handles.append(vectors.register_hook(enter("pose encoder")))

        return hook

    def ends(part: str, following: str) -> Any:
        def hook(_: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
            if part in forward:
                live.region = following
                forward.discard(part)
                if output[0].requires_grad:
                    handles.append(output[0].register_hook(enter(part)))

        return hook

    def decoder_starts(_: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        words = inputs[0] if inputs else named["hidden_states"]
        if "decoder" in forward and words.requires_grad:
            handles.append(words.register_hook(enter("words")))

    def marker(stack: list[tuple[int, int, float]], number: int) -> Any:
        def hook(*_: Any) -> None:
            if len(stack) == number:
                stack.append((live.live, live.kernels, live.flops))

        return hook

    handles: list[Any] = [decoder.register_forward_hook(ends("decoder", "scores"), with_kwargs=True)]
    if encoder is None:
        handles.append(decoder.register_forward_pre_hook(starts("decoder"), with_kwargs=True))
    else:
        handles.append(encoder.register_forward_pre_hook(starts("encoder"), with_kwargs=True))
        handles.append(encoder.register_forward_hook(ends("encoder", "decoder"), with_kwargs=True))
        for layer in layer_list(decoder)[:1]:
            handles.append(layer.register_forward_pre_hook(decoder_starts, with_kwargs=True))
    for stack, found in zip((encoder, decoder), marks.stacks, strict=True):
        layers = layer_list(stack) if stack is not None else nn.ModuleList()
        handles += [layer.register_forward_hook(marker(found, number)) for number, layer in enumerate(layers)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the operations.

    Args:
        owned: the model's tensors, of which operations make views.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        super().__init__()
        self._owned = {tensor.untyped_storage()._cdata for tensor in owned}
        self.region = "pose encoder"
        self.backward = False
        self.of_backward: dict[str, tuple[int, float]] = {}
        self.peaks: dict[str, int] = {}
        self.live = 0
        self.kernels = 0
        self.flops = 0.0
        self.bf16_products: set[object] = set()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name == "aten._local_scalar_dense.default" and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            # Models ask whether a mask hides nothing: here every batch has padding.
            return False if args[0].dtype == torch.bool else 1
        by_mask = name in INDEXING and _by_mask(args[1])
        result = _all_rows(name, args) if by_mask else func(*args, **kwargs)
        packet = func.overloadpacket
        if str(packet) in PRODUCTS and result.dtype == torch.bfloat16 and _products(args) > SMALLEST_PRODUCT:
            self.bf16_products.add((packet, *((tensor.shape, tensor.stride()) for tensor in _tensors(args))))
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0.0
        made = [self.add(tensor) for tensor in _tensors(result)]
        launches = any(made) or name.split(".")[1].endswith("_")
        self.kernels, self.flops = self.kernels + launches, self.flops + flops
        if self.backward:
            before = self.of_backward.get(self.region, (0, 0.0))
            self.of_backward[self.region] = (before[0] + launches, before[1] + flops)
        return result

    def add(self, tensor: Tensor) -> bool:
        """Count the storage of a tensor; whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._owned:
            return False
        self._sizes[key] = size = storage.nbytes()
        self.live += size
        self.peaks[self.region] = max(self.peaks.get(self.region, 0), self.live)
        weakref.finalize(storage, self._remove, key)
        return True

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _tensors(result: Any) -> list[Tensor]:
    values = result if isinstance(result, tuple | list) else (result,)
    return [value for value in values if isinstance(value, Tensor)]


def _products(args: Any) -> int:
    """Multiplications of a matrix product, of one matrix of a batch."""
    left, right = _tensors(args)[-2:]
    return int(left.shape[-2] * left.shape[-1] * right.shape[-1])


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _all_rows(name: str, args: Any) -> Tensor:
    """The result of indexing by a mask that is true everywhere: how many rows a real one has depends on its values."""
    values, indices = args[0], args[1]
    if name != "aten.index.Tensor":
        return values if name == "aten.index_put_.default" else torch.empty_like(values)
    mask = next(index for index in indices if index is not None)
    return values.new_empty((mask.numel(), *values.shape[mask.ndim :]))
