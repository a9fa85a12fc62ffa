"""Seconds of a step by a stated model of the hardware (``hardware.py``), to compare DeepSpeed JSONs with each other."""

from __future__ import annotations

from toolkit.planning import hardware as machine
from toolkit.planning.costs.counts import Weight, weights_of_rank
from toolkit.planning.hardware import Hardware
from toolkit.planning.plan import Plan, gradient_tensors
from toolkit.recipe.resolve import ResolvedRun


def pass_seconds(plan: Plan, resolved: ResolvedRun, weights: list[Weight], *, products_alone: bool = False) -> float:
    """How long a forward and backward pass over the largest micro-batch takes.

    As long as its matrix products or the launches of its kernels, whichever is longer, and DeepSpeed's work for each
    weight; nothing overlaps. With ``products_alone`` the matrix products. What ranks of a tensor-parallel group send
    within a layer is not counted.
    """
    low = resolved.precision != "fp32" or resolved.autocast
    own = weights_of_rank(weights, resolved.tensor_parallel_size)
    share = sum(item.numel for item in own) / sum(item.numel for item in weights)
    products = share * plan.pass_.flops / (machine.FLOPS * (1.0 if low else machine.FP32_SHARE))
    if products_alone:
        return products
    # Stages 0 and 1 sum gradients once a step, the others in every backward pass.
    hooks = gradient_tensors(weights) * (machine.HOOK_SECONDS if resolved.zero_stage >= 2 else machine.HOOK_SECONDS / 2)
    gathers = 3 * len(weights) / 2 * machine.GATHER_SECONDS if resolved.zero_stage == 3 else 0.0
    return max(products, plan.pass_.kernels * machine.KERNEL_SECONDS) + hooks + gathers


def step_seconds(plan: Plan, resolved: ResolvedRun, hardware: Hardware, weights: list[Weight]) -> float:
    """How long an optimizer step takes: its passes, what ranks send, what crosses the host link, and the update."""
    passes, zero = plan.accumulation_steps, plan.zero
    compute = passes * pass_seconds(plan, resolved, weights)
    bandwidth = machine.NODE_BANDWIDTH if hardware.nodes == 1 else machine.NETWORK_BANDWIDTH
    communication = (zero.sent + (passes - 1) * zero.sent_again) / bandwidth
    link = zero.over_link * (1 if resolved.zero_stage < 3 else passes) / machine.HOST_LINK
    on_disk = 2 * plan.nvme / machine.NVME_BANDWIDTH
    if zero.host and not (zero.master or zero.moments):
        update = zero.of_optimizer * hardware.ranks_per_node / machine.HOST_ADAM
    else:
        update = zero.of_optimizer / machine.MEMORY_BANDWIDTH
    return compute + communication + link + on_disk + update
