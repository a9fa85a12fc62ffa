"""Freeze a pretrained backbone for the first steps, while the pose encoder with its random weights trains.

Otherwise the gradients of an untrained pose encoder would change the backbone and fill its optimizer's moments.
Parameters cannot be added to a DeepSpeed optimizer later: it flattens them once. So all of them are in it from the
start, and while the backbone is frozen

* its gradients are replaced by zeros as autograd makes them, before any ZeRO stage sees them: its moments stay exactly
  zero, and clipping uses the norm of what trains;
* its learning rate is 0, because weight decay changes weights without gradients;
* when it thaws, its optimizer's step count restarts from 0, because Adam's bias correction depends on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.checkpointing.zero_shards import base_optimizer, shards
from toolkit.models.translator import FRESH


class BackboneFreeze:
    """Freezes the backbone of a translator, as DeepSpeed holds it, until :meth:`thaw`."""

    def __init__(self, module: nn.Module) -> None:
        self._handles = [
            parameter.register_hook(torch.zeros_like)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and not name.startswith(FRESH)
        ]

    def thaw(self, engine: Any) -> None:
        """Train the backbone from the next step on."""
        for handle in self._handles:
            handle.remove()
        for shard in shards(engine):
            # A group holds either the backbone's parameters or others, and so do its shards.
            if shard.fragments and not shard.fragments[0].name.startswith(FRESH):
                restart_steps(shard.state)
        for group in base_optimizer(engine).param_groups:
            if group["name"] == "backbone":
                restart_steps(group)


def restart_steps(state: dict[str, Any]) -> None:
    """Set an optimizer's step count to 0, if any: in a shard's state, or in a group as DeepSpeed's FusedAdam."""
    if isinstance(state.get("step"), torch.Tensor):
        state["step"].zero_()
    elif "step" in state:
        state["step"] = 0
