"""Where DeepSpeed keeps what it trains: the pieces of every ZeRO stage, and which part of which parameter each holds.

ZeRO flattens parameters, glues them together and gives each rank a slice. A :class:`Shard` is such a slice with its
optimizer state, and says by name what is in it. Whoever speaks of shards needs to know nothing of ZeRO; in return this
file, and no other, knows the insides of DeepSpeed's optimizers. It knows no files.

Anything of a shard's length that is put into its ``state`` beside the optimizer's own (an average of the weights, say)
is saved and restored, at any stage, like the optimizer's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter.

    Attributes:
        name: of the parameter, as ``named_parameters`` of the unwrapped model gives it.
        shape: of the whole parameter.
        start: its first element, counted in the flattened parameter.
        numel: number of elements.
        offset: where they begin in the shard.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """A tensor that the optimizer steps on this rank.

    Attributes:
        values: [elements] the weights, in the precision in which they are stepped. Writing to it changes them.
        state: the optimizer's state of it (``exp_avg``, ``step``, ...); empty before the first step.
        fragments: what it holds; what they leave out is padding.
        replicated: every rank has this same shard.
    """

    values: Tensor
    state: dict[str, Any]
    fragments: tuple[Fragment, ...]
    replicated: bool = False


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer proper, inside DeepSpeed's wrappers."""
    return engine.basic_optimizer


def shards(engine: Any) -> Iterator[Shard]:
    """This rank's shards, to be read; all ranks call this.

    A shard that lives on an NVMe disk is in memory only until the next one is asked for.
    """
    yield from _shards(engine, changed=False)


@torch.no_grad()
def rewrite_shards(engine: Any) -> Iterator[Shard]:
    """This rank's shards, to be written; the model's own weights follow. All ranks must exhaust this."""
    yield from _shards(engine, changed=True)


def scalars_of(shard: Shard) -> dict[str, Any]:
    """The state's plain numbers as JSON can say them: a number, or for a tensor of no dimension ``[number, dtype]``."""
    found: dict[str, Any] = {}
    for key, value in shard.state.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            found[key] = [value.item(), str(value.dtype).removeprefix("torch.")]
        elif isinstance(value, int | float):
            found[key] = value
    return found


def set_scalars(engine: Any, shard: Shard, scalars: dict[str, Any], *, same_optimizer: bool) -> None:
    """Put back what :func:`scalars_of` found, as the optimizer of this run wants it.

    Args:
        engine: the DeepSpeed engine.
        shard: one of its shards.
        scalars: of an optimizer of the same method.
        same_optimizer: it was of the same class.
    """
    base = base_optimizer(engine)
    for key, saved in scalars.items():
        value, dtype = saved if isinstance(saved, list) else (saved, None)
        if not same_optimizer:  # torch's Adams count in tensors, DeepSpeed's in integers
            value, dtype = (float(value), "float32") if isinstance(base, torch.optim.Adam) else (int(value), None)
        # torch's Adams want their count where the weights are when they are fused, and all others can do with that.
        device = shard.values.device
        shard.state[key] = torch.tensor(value, dtype=getattr(torch, dtype), device=device) if dtype else value
    if "step" in scalars:
        for group in base.param_groups:
            if "step" in group or type(base).__name__ == "FusedAdam":  # DeepSpeed's counts by group
                group["step"] = steps_of(scalars)


def steps_of(scalars: dict[str, Any]) -> int:
    """Steps that an optimizer has taken with a shard, as :func:`scalars_of` tells it; 0 where it does not count."""
    step = scalars.get("step", 0)
    return int(step[0] if isinstance(step, list) else step)


def state_dtype(engine: Any, shard: Shard, key: str, saved: torch.dtype) -> torch.dtype:
    """The precision in which the optimizer of this run keeps a state that was saved in another, perhaps."""
    base: Any = base_optimizer(engine)
    if key not in ("exp_avg", "exp_avg_sq"):
        return saved
    if isinstance(base, torch.optim.Adam):
        return shard.values.dtype
    if hasattr(base, "fp32_optimizer_states"):  # DeepSpeedCPUAdam
        return torch.float32 if base.fp32_optimizer_states else shard.values.dtype
    return saved


def replay_steps(engine: Any, steps: set[int]) -> None:
    """Bring DeepSpeedCPUAdam's hidden powers of beta to where they were, to the last bit.

    It multiplies them step by step in C++, and computes them afresh, to another last bit, whenever the next count that
    it is given does not follow the last one: which is always, where shards have different counts.

    Args:
        engine: the DeepSpeed engine.
        steps: all counts that its shards have.
    """
    base: Any = base_optimizer(engine)
    if not hasattr(base, "ds_opt_adam") or len(steps) != 1:
        return
    group = base.param_groups[0]
    dummy = [torch.zeros(1) for _ in range(4)]
    for step in range(1, max(steps) + 1):
        base.ds_opt_adam.adam_update(
            base.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *dummy
        )


def _shards(engine: Any, *, changed: bool) -> Iterator[Shard]:
    optimizer, base = engine.optimizer, base_optimizer(engine)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if optimizer is base:
        yield from _bare(base, names)
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage_3(optimizer, base, names, changed=changed)
    elif hasattr(optimizer, "update_lp_params"):
        yield from _stage_1_and_2(optimizer, base, names)
        if changed:
            optimizer.update_lp_params()
    else:
        yield from _half_precision(optimizer, base, names, changed=changed)


def _bare(base: torch.optim.Optimizer, names: dict[Tensor, str]) -> Iterator[Shard]:
    """Stage 0 in fp32: the optimizer steps the parameters themselves."""
    for group in base.param_groups:
        for parameter in group["params"]:
            yield Shard(parameter, base.state[parameter], (_whole(names[parameter], parameter),), replicated=True)


def _half_precision(
    optimizer: Any, base: torch.optim.Optimizer, names: dict[Tensor, str], *, changed: bool
) -> Iterator[Shard]:
    """Stage 0 in half precision: an fp32 copy of each group with DeepSpeed's FusedAdam, else of each parameter."""
    for number, parameters in enumerate(optimizer.fp16_groups):
        if hasattr(optimizer, "fp32_groups_flat"):
            flat, offset, fragments = optimizer.fp32_groups_flat[number], 0, []
            for parameter in parameters:
                fragments.append(_whole(names[parameter], parameter, offset))
                offset += parameter.numel()
            found = [(Shard(flat, base.state[flat], tuple(fragments), replicated=True), parameters)]
        else:
            pairs = zip(optimizer.fp32_groups[number], parameters, strict=True)
            found = [
                (Shard(copy, base.state[copy], (_whole(names[parameter], parameter),), replicated=True), [parameter])
                for copy, parameter in pairs
            ]
        for shard, members in found:
            yield shard
            for fragment, parameter in zip(shard.fragments, members if changed else (), strict=changed):
                values = shard.values.view(-1).narrow(0, fragment.offset, fragment.numel)
                parameter.data.copy_(values.view_as(parameter))


def _stage_1_and_2(optimizer: Any, base: torch.optim.Optimizer, names: dict[Tensor, str]) -> Iterator[Shard]:
    """Each group is one flat tensor, of which each rank has an equal slice; parameters may straddle two ranks."""
    fragments: list[list[Fragment]] = [[] for _ in base.param_groups]
    for parameter, name in names.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragments[mapping.param_group_index].append(
                Fragment(name, tuple(parameter.shape), inside.start, inside.numel, outside.start)
            )
    for group, members in zip(base.param_groups, fragments, strict=True):
        flat = group["params"][0]
        yield Shard(flat, base.state[flat], tuple(members))


def _stage_3(
    optimizer: Any, base: torch.optim.Optimizer, names: dict[Tensor, str], *, changed: bool
) -> Iterator[Shard]:
    """Each parameter is cut into equal slices, padded at the end; sub-groups of slices make a flat tensor."""
    if changed:
        optimizer.checkpoint_event_prologue()
    for number, parameters in enumerate(optimizer.fp16_groups):
        on_disk = optimizer._swappable_optimizer_subgroup(number)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        flat = optimizer.fp32_partitioned_groups_flat[number]
        fragments = []
        for parameter in parameters:
            _, offset, slice_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = slice_numel * parameter.ds_zero_partition_rank
            numel = min(slice_numel, parameter.ds_numel - start)
            if numel > 0:
                fragments.append(Fragment(names[parameter], tuple(parameter.ds_shape), start, numel, offset))
        yield Shard(flat, base.state[flat], tuple(fragments))
        if changed:
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if on_disk and changed:
            optimizer._optimizer_states_and_gradient_swap_out(number)
        elif on_disk:
            optimizer._release_swap_buffers(number)
    if changed:
        optimizer.checkpoint_event_epilogue()


def _whole(name: str, parameter: Tensor, offset: int = 0) -> Fragment:
    return Fragment(name, tuple(parameter.shape), 0, parameter.numel(), offset)
