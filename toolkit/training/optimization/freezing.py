"""The first steps of a run, in which only what begins with random weights learns.

A pretrained backbone would otherwise be trained, and its optimiser's moments filled, by gradients that come through a
pose encoder that knows nothing yet. Parameters cannot be taken in and out of a DeepSpeed optimiser: it cuts them into
flat pieces once. So all of them stay, and while the backbone waits

* its gradients are replaced by zeros as autograd makes them, before any ZeRO stage sees them: its moments stay exactly
  zero, and the norm that clipping looks at is that of what learns;
* its learning rate is 0, for weight decay moves weights without gradients, too;
* when it thaws, its optimiser's count of steps starts again from 0, as Adam corrects the bias of young moments by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.checkpointing.zero_shards import base_optimizer, shards
from toolkit.training.optimization.optimizers import FRESH


class BackboneFreeze:
    """Keeps a backbone still until :meth:`thaw`.

    Args:
        module: the translator, as DeepSpeed holds it, before its first backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self._handles = [
            parameter.register_hook(torch.zeros_like)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and not name.startswith(FRESH)
        ]

    def thaw(self, engine: Any) -> None:
        """Let the backbone learn from the next step on.

        Args:
            engine: the DeepSpeed engine, at any stage.
        """
        for handle in self._handles:
            handle.remove()
        for shard in shards(engine):
            # Groups do not mix the backbone with anything else, so neither do the pieces of a group.
            if shard.fragments and not shard.fragments[0].name.startswith(FRESH):
                restart_steps(shard.state)
        for group in base_optimizer(engine).param_groups:
            if group["name"] == "backbone":
                restart_steps(group)


def restart_steps(state: dict[str, Any]) -> None:
    """Set an optimiser's count of steps to 0, where it keeps one: by piece, or by group as DeepSpeed's FusedAdam."""
    if isinstance(state.get("step"), torch.Tensor):
        state["step"].zero_()
    elif "step" in state:
        state["step"] = 0
