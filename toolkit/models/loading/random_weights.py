"""Random weights for a model on the meta device, drawn one tensor at a time.

A model too large for one process cannot be built first and initialised afterwards. transformers' initialisation runs
over a skeleton on the meta device, where its functions are recorded instead of called; each tensor is drawn later.
Every tensor has a generator of its own, seeded by its name, so its values do not depend on precision, ranks, ZeRO
stage, quantisation or the order of drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from toolkit.models.backbone import new_backbone

# transformers' initialisation functions: those that draw take a generator, the others set fixed values.
DRAWING = (
    *("uniform_", "normal_", "trunc_normal_", "orthogonal_", "sparse_"),
    *("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"),
)
SETTING = ("constant_", "ones_", "zeros_", "eye_", "dirac_", "copy_")


@dataclass(frozen=True)
class InitCall:
    """One call of an initialisation function.

    ``view`` is size, stride and offset of the part of the tensor that it fills; None for all of it.
    """

    function: str  # its name in ``transformers.initialization``
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None
    arguments: tuple[Any, ...]  # its other positional arguments
    settings: dict[str, Any]  # its keyword arguments


@dataclass
class Skeleton:
    """A model on the meta device, and how each of its tensors is initialised.

    Attributes:
        model: its parameters and buffers have shapes and no memory; tied weights are one parameter.
        steps: by the identity of a tensor, what transformers does to it; later steps overwrite earlier ones.
    """

    model: PreTrainedModel
    steps: dict[int, list[InitCall]] = field(default_factory=dict)

    def draw(self, tensor: Tensor, name: str, seed: int) -> Tensor:
        """Values for one of the skeleton's tensors, on the CPU, in its own type; name and seed give its generator.

        Raises:
            NotImplementedError: the architecture does not say how this tensor is initialised.
        """
        steps = self.steps.get(id(tensor))
        if not steps:
            raise NotImplementedError(f"{type(self.model).__name__} does not say how {name} is initialised")
        generator = torch.Generator().manual_seed(_number(seed, name))
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        # What a later call overwrites as a whole is not drawn.
        first = max((number for number, step in enumerate(steps) if step.view is None), default=0)
        with torch.no_grad():
            for step in steps[first:]:
                part = values if step.view is None else values.as_strided(*step.view)
                settings = step.settings | ({"generator": generator} if step.function in DRAWING else {})
                getattr(initialization, step.function)(part, *step.arguments, **settings)
        return values


def make_skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Skeleton:
    """The backbone that ``config`` describes, without memory for its weights."""
    # Untied until the calls are recorded, as in transformers: a tied weight gets its source's initialisation.
    with torch.device("meta"), initialization.no_tie_weights():
        model = new_backbone(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    skeleton = Skeleton(model)
    with _recording(skeleton.steps):
        model.initialize_weights()
    model.tie_weights()
    return skeleton


@contextmanager
def _recording(steps: dict[int, list[InitCall]]) -> Iterator[None]:
    """Record the calls of transformers' initialisation functions instead of running them."""

    def recorder(function: str) -> Callable[..., Tensor]:
        def record(tensor: Tensor, *arguments: Any, **settings: Any) -> Tensor:
            whole = tensor if tensor._base is None else tensor._base
            view = None if whole is tensor else (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
            settings.pop("generator", None)
            steps.setdefault(id(whole), []).append(InitCall(function, view, arguments, settings))
            return tensor

        return record

    originals = {name: getattr(initialization, name) for name in (*DRAWING, *SETTING)}
    try:
        for name in originals:
            setattr(initialization, name, recorder(name))
        yield
    finally:
        for name, function in originals.items():
            setattr(initialization, name, function)


def _number(seed: int, name: str) -> int:
    """A seed for one tensor, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
