"""The layer of the backbone that each parameter is in, found from the modules: no family needs a table of names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.models.backbone import stack_layers, stacks


@dataclass(frozen=True)
class Place:
    """Where a parameter of the backbone is.

    The last layer, and what follows it (final norm, output layer), have 0 layers above, embeddings all of the stack.
    """

    above: int  # layers of its stack above it
    in_layer: bool  # whether it belongs to a layer of a stack
    embedding: bool  # whether it is an embedding, tied to the output layer or not


def places(model: nn.Module) -> dict[str, Place]:
    """Every parameter of a translator's backbone by its name in the translator."""
    backbone: Any = model.backbone
    halves = stacks(backbone)
    layers_of = [stack_layers(half) for half in halves]
    above = {
        id(parameter): len(layers) - 1 - number
        for layers in layers_of
        for number, layer in enumerate(layers)
        for parameter in layer.parameters()
    }
    embeddings = {id(weight) for weight in _embeddings(backbone)}
    deepest = max(map(len, layers_of), default=0)
    # An encoder's and a decoder's own embeddings are below their own stack, shared ones below the deeper one.
    depth = {id(weight): deepest for weight in _embeddings(backbone)}
    for stack, layers in zip(halves, layers_of, strict=True):
        shared = {id(weight) for weight in backbone.get_input_embeddings().parameters()}
        depth |= {id(weight): len(layers) for weight in _embeddings(stack) if id(weight) not in shared | above.keys()}
    return {
        name: Place(
            above=above.get(id(parameter), depth.get(id(parameter), 0)),
            in_layer=id(parameter) in above,
            embedding=id(parameter) in embeddings,
        )
        for name, parameter in model.named_parameters()
        if name.startswith("backbone.")
    }


def _embeddings(module: nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            yield part.weight
