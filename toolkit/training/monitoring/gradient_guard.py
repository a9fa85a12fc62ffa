"""Stop a run whose first backward pass gives a trainable tensor no gradient, or one that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from toolkit.errors import UserError


class TrainingStopped(UserError):
    """The run is broken and was stopped before its optimizer step; the last checkpoint is intact."""


class GradientGuard:
    """Checks that the first backward pass gives every trainable tensor a finite gradient.

    Hooks see the gradients as autograd makes them. DeepSpeed's ``safe_get_full_grad`` reads them afterwards and fails
    under ZeRO-2 with offload where a tensor is partitioned over two ranks (0.19.8).

    It is made before the first backward pass, at any ZeRO stage. With ``may_overflow`` gradients need not be finite:
    the loss scale of fp16 finds its value by overflows, whose steps DeepSpeed skips.
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
        """Remove the hooks and judge; all ranks call this between the backward passes and the optimizer step.

        Raises:
            TrainingStopped: a tensor had no gradient, or one that is not finite; the rank that saw it names it.
        """
        for handle in self._handles:
            handle.remove()
        problems = torch.tensor(len(self._waiting) + len(self._not_finite), device=device)
        distributed.all_reduce(problems)
        if not problems.item():
            return
        seen = (("no gradient", self._waiting), ("a gradient that is not finite", self._not_finite))
        problem = "; ".join(f"{what}: {', '.join(sorted(names)[:5])}" for what, names in seen if names)
        raise TrainingStopped(
            f"after the first backward pass trainable tensors have {problem or 'no finite gradient on another rank'}",
            "freeze what the forward pass never reaches, or lower training.learning_rate, or train in fp32",
        )
