"""Stop a run whose first backward pass gives a trainable tensor no gradient, or one that is not finite."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.models.compiled import uncompiled


class TrainingStopped(UserError):
    """The run is broken and was stopped before its optimizer step; the last checkpoint is intact."""


class GradientGuard:
    """Checks that the first backward pass gives every trainable tensor a finite gradient.

    Hooks see the gradients as autograd makes them. DeepSpeed's ``safe_get_full_grad`` reads them afterwards and fails
    under ZeRO-2 with offload where a tensor is partitioned over two ranks (0.19.8).

    It is made before the first backward pass, at any ZeRO stage. Until it has counted no layer runs compiled: a graph
    belongs to the hooks of its weights, and each layer would be compiled once more without them. With
    ``may_overflow`` gradients need not be finite: the loss scale of fp16 finds its value by overflows, whose steps
    DeepSpeed skips.
    """

    def __init__(self, module: nn.Module, *, may_overflow: bool = False) -> None:
        self._waiting = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._is_finite: dict[str, list[Tensor]] = {}  # of each gradient, on its device, so that the host need not wait
        self._may_overflow = may_overflow
        self._handles = [
            parameter.register_hook(lambda gradient, name=name: self._see(name, gradient))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self._until_counted = ExitStack()
        self._until_counted.enter_context(uncompiled(module))

    def _see(self, name: str, gradient: Tensor) -> None:
        self._waiting.discard(name)
        if not self._may_overflow:
            self._is_finite.setdefault(name, []).append(gradient.isfinite().all())

    def count(self, device: torch.device) -> Tensor:
        """Remove the hooks after the backward passes; gives the number of this rank's problems, on ``device``."""
        self._until_counted.close()
        for handle in self._handles:
            handle.remove()
        flags = [flag.to(device) for flags in self._is_finite.values() for flag in flags]
        not_finite = torch.stack(flags).logical_not().sum() if flags else torch.zeros((), device=device)
        return not_finite + len(self._waiting)

    def check(self, problems: float) -> None:
        """Judge, before the optimizer step: ``problems`` are those of all ranks.

        Raises:
            TrainingStopped: a tensor had no gradient, or one that is not finite; the rank that saw it names it.
        """
        if not problems:
            return
        not_finite = {name for name, flags in self._is_finite.items() if not all(flag.item() for flag in flags)}
        seen = (("no gradient", self._waiting), ("a gradient that is not finite", not_finite))
        problem = "; ".join(f"{what}: {', '.join(sorted(names)[:5])}" for what, names in seen if names)
        raise TrainingStopped(
            f"after the first backward pass trainable tensors have {problem or 'no finite gradient on another rank'}",
            "freeze what the forward pass never reaches, or lower training.learning_rate, or train in fp32",
        )
