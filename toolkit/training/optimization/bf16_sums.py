"""Sums of gradients in DeepSpeed's optimizer for bf16 weights at ZeRO stage 1, which keeps whole sums in fp32.

DeepSpeed sets all sums to zero twice a step, casts each gradient to fp32 in memory of its own before it adds it, keeps
the gradients in bf16 to set them to zero in turn, and computes a norm of each. Here the first gradients of a step
replace the sums, later ones are added as they are, and norm and clipping take a group's sums at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def join_sums(engine: Any) -> None:
    """Have the engine's optimizer sum so, where it is that one and nobody else's ranks hold parts of its layers."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "update_hp_grads") or optimizer.immediate_grad_update or optimizer.has_moe_layers:
        return
    # What each sum holds is of an earlier step, and counts as zero.
    is_old = [[False] * len(group) for group in optimizer.bf16_groups]
    ready_for_reduction = optimizer.get_grads_for_reduction

    def add(clear_lp_grads: bool = False) -> None:
        for index, group in enumerate(optimizer.bf16_groups):
            has = optimizer.fp32_groups_has_gradients[index]
            _add(group, optimizer.fp32_groups_gradients[index], has)

    def clear() -> None:
        for index, has in enumerate(optimizer.fp32_groups_has_gradients):
            is_old[index] = [old or new for old, new in zip(is_old[index], has, strict=True)]
            optimizer.fp32_groups_has_gradients[index] = [False] * len(has)

    def finish() -> None:
        """Set sums to zero that got no gradient in this step."""
        for index, has in enumerate(optimizer.fp32_groups_has_gradients):
            sums = zip(optimizer.fp32_groups_gradients[index], is_old[index], has, strict=True)
            if left := [total for total, old, new in sums if old and not new]:
                torch._foreach_zero_(left)
            is_old[index] = [False] * len(has)

    def for_reduction() -> Any:
        finish()
        return ready_for_reduction()

    def for_norm(for_clipping: bool = False) -> Any:
        finish()
        sums = list(optimizer.fp32_groups_actual_gradients_flat)
        return sums if for_clipping else (sums, {})

    optimizer.update_hp_grads, optimizer.clear_hp_grads = add, clear
    optimizer.get_grads_for_reduction, optimizer.get_grads_for_norm = for_reduction, for_norm


@torch.no_grad()
def _add(weights: list[nn.Parameter], sums: list[Tensor], has: list[bool]) -> None:
    """Move the gradients of weights into their sums; ``has`` says which sums are of this step, and will."""
    first: list[tuple[Tensor, Tensor]] = []  # sums and gradients
    later: list[tuple[Tensor, Tensor]] = []
    for place, (weight, total) in enumerate(zip(weights, sums, strict=True)):
        if weight.grad is None:
            continue
        (later if has[place] else first).append((total, weight.grad.flatten()))
        weight._hp_grad, weight.grad, has[place] = total, None, True  # type: ignore[attr-defined]
    for pairs, move in ((first, torch._foreach_copy_), (later, torch._foreach_add_)):
        if pairs:
            move([total for total, _ in pairs], [gradient for _, gradient in pairs])
