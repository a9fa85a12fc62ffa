"""Which part of a model computes while a pass is traced, and what each layer of its stacks adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from toolkit.models.backbone import halves, layer_list
from toolkit.models.translator import PoseTranslator
from toolkit.planning.costs.storages import Storages


@dataclass(frozen=True)
class Layer:
    """What one layer of a stack adds to a traced pass.

    Attributes:
        saved: bytes that wait for its backward pass.
        kernels, flops: of its forward and backward pass.
    """

    saved: int = 0
    kernels: int = 0
    flops: float = 0.0


# Regions of a stack's backward pass: its second layer from the end, which stands for those that are left out, and the
# layers behind it.
MIDDLE, BEHIND = " middle", " behind"
Mark = tuple[int, int, float]  # bytes that are alive, operations and FLOPs until now


@dataclass
class Stack:
    """The marks of a stack's passes.

    Attributes:
        forward: one when each layer was done, in the first forward pass.
        backward: one when the gradient of each layer's output was there, that of the last layer first.
    """

    forward: list[Mark] = field(default_factory=list)
    backward: list[Mark] = field(default_factory=list)

    def layer(self) -> Layer:
        """What a layer between others adds, of a stack of at least three.

        The first layer also computes what all layers share, such as T5's position bias, and the gradients of what they
        share are added to those of the layer behind, which the last one has not.
        """
        before, after = self.forward[-2:]
        begins, ends = self.backward[-2:]
        return Layer(after[0] - before[0], after[1] - before[1] + ends[1] - begins[1],
                     after[2] - before[2] + ends[2] - begins[2])  # fmt: skip


@contextmanager
def watching(model: PoseTranslator, live: Storages) -> Iterator[tuple[Stack, Stack]]:
    """Follow which part of the model computes, forward and backward; drop gradients of weights, as DeepSpeed does.

    Yields:
        what is noted of encoder and decoder.
    """
    encoder, decoder = halves(model.backbone)
    stacks = Stack(), Stack()
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

    def mark(marks: list[Mark]) -> None:
        marks.append((live.live, live.kernels, live.flops))

    def marker(part: str, stack: Stack, number: int) -> Any:
        def arrives(_: Tensor) -> None:
            mark(stack.backward)
            live.region = f"{part}{('', MIDDLE, BEHIND)[min(2, len(stack.backward) - 1)]}"

        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if len(stack.forward) == number:
                mark(stack.forward)
                vectors = output[0] if isinstance(output, tuple) else output
                if vectors.requires_grad:
                    handles.append(vectors.register_hook(arrives))

        return hook

    handles: list[Any] = [decoder.register_forward_hook(ends("decoder", "scores"), with_kwargs=True)]
    if encoder is None:
        handles.append(decoder.register_forward_pre_hook(starts("decoder"), with_kwargs=True))
    else:
        handles.append(encoder.register_forward_pre_hook(starts("encoder"), with_kwargs=True))
        handles.append(encoder.register_forward_hook(ends("encoder", "decoder"), with_kwargs=True))
        for layer in layer_list(decoder)[:1]:
            handles.append(layer.register_forward_pre_hook(decoder_starts, with_kwargs=True))
    for part, stack, found in zip(("encoder", "decoder"), (encoder, decoder), stacks, strict=True):
        layers = layer_list(stack) if stack is not None else nn.ModuleList()
        handles += [layer.register_forward_hook(marker(part, found, number)) for number, layer in enumerate(layers)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(live.take_gradient))
    try:
        yield stacks
    finally:
        for handle in handles:
            handle.remove()
