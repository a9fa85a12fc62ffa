"""Checks that stop a run which would only pretend to learn."""

from __future__ import annotations

from torch import nn

from toolkit.errors import UserError


class TrainingStopped(UserError):
    """The run found itself broken and stopped before it did harm; the last checkpoint is intact."""


def check_gradients(module: nn.Module) -> None:
    """After the first backward pass every trainable tensor must have a finite gradient.

    All ranks must call this, between the backward pass and the optimizer step; it works at every ZeRO stage.

    Raises:
        TrainingStopped: a tensor has no gradient, or one that is not finite; it is named.
    """
    from deepspeed.utils import safe_get_full_grad

    without, not_finite = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            without.append(name)
        elif not bool(gradient.isfinite().all()):
            not_finite.append(name)
    for kind, names in (("no gradient", without), ("a gradient that is not finite", not_finite)):
        if names:
            raise TrainingStopped(
                f"after the first backward pass {len(names)} trainable tensors have {kind}: {', '.join(names[:5])}; "
                "freeze what the forward pass never reaches, or lower the learning rate or precision"
            )
