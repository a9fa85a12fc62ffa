"""Checks that stop a run which would only pretend to learn."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from toolkit.errors import UserError


class TrainingStopped(UserError):
    """The run found itself broken and stopped before it did harm; the last checkpoint is intact."""


class GradientWatch:
    """Sees to it that the first backward pass gives every trainable tensor a finite gradient.

    It watches the gradients as autograd makes them. DeepSpeed's own ``safe_get_full_grad`` looks at them afterwards
    and fails under ZeRO-2 with offload where a tensor lies across two ranks (0.19.8).

    Args:
        module: the model, before its first backward pass; at any ZeRO stage.
        may_overflow: ask only for gradients: the loss scale of fp16 finds its value by overflows, whose steps
            DeepSpeed skips.
    """

    def __init__(self, module: nn.Module, *, may_overflow: bool = False) -> None:
        self._waiting = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._not_finite: set[str] = set()
        self._may_overflow = may_overflow
        self._handles = [
            parameter.register_hook(lambda gradient, name=name: self._see(name, gradient))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    def _see(self, name: str, gradient: Tensor) -> None:
        self._waiting.discard(name)
        if not self._may_overflow and not bool(gradient.isfinite().all()):
            self._not_finite.add(name)

    def check(self, device: torch.device) -> None:
        """Stop watching; all ranks call this after the backward passes of the first step, before the optimizer's.

        Raises:
            TrainingStopped: a tensor had no gradient, or one that is not finite; it is named by the rank that saw it.
        """
        for handle in self._handles:
            handle.remove()
        problems = torch.tensor(len(self._waiting) + len(self._not_finite), device=device)
        distributed.all_reduce(problems)
        if not problems.item():
            return
        seen = (("no gradient", self._waiting), ("a gradient that is not finite", self._not_finite))
        told = "; ".join(f"{what}: {', '.join(sorted(names)[:5])}" for what, names in seen if names)
        raise TrainingStopped(
            f"after the first backward pass trainable tensors have {told or 'no finite gradient on another rank'}; "
            "freeze what the forward pass never reaches, or lower training.learning_rate or the precision"
        )
