"""The trained weights and optimizer states of this rank at every ZeRO stage, and to which parameters they belong.

ZeRO flattens parameters, concatenates them and gives each rank a slice. A :class:`Shard` is such a slice with its
optimizer state and the names of the parameters in it. Only this file knows the internals of DeepSpeed's optimizers;
code that uses shards needs to know nothing of ZeRO. Nothing here reads or writes files.

A tensor of a shard's length that is added to its ``state`` (such as an average of the weights) is saved and restored at
any stage, like the optimizer's own states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.cluster.tensor_parallel import part_of


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one parameter."""

    name: str  # of the parameter, as :func:`saved_name` gives it
    shape: tuple[int, ...]  # of the whole parameter, or of its part that the ranks of one place hold (AutoTP)
    start: int  # its first element, counted in the flattened parameter
    numel: int  # number of elements
    offset: int  # index of the first one in the shard


@dataclass(frozen=True)
class Shard:
    """A tensor that the optimizer updates on this rank."""

    values: Tensor  # [elements] the weights, in the precision of the optimizer. Writing to it changes them.
    state: dict[str, Any]  # the optimizer's state of them (``exp_avg``, ``step``, ...); empty before the first step
    fragments: tuple[Fragment, ...]  # the parts of parameters in it; elements outside them are padding
    replicated: bool = False  # every rank has this same shard


def saved_name(name: str, parameter: Tensor, number: int | None = None) -> str:
    """The name of a parameter in checkpoints: its own, as ``named_parameters`` of the unwrapped model gives it.

    A parameter that AutoTP splits is saved as its parts: of ``number``, or of this rank.
    """
    part = part_of(parameter)
    return f"{name}[{part.number if number is None else number} of {part.of}]" if part else name


def saved_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """All that a checkpoint of this model holds, of all ranks: shapes of trained parameters by their saved names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = part_of(parameter)
            for number in range(part.of if part else 1):
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                shapes[saved_name(name, parameter, number)] = shape
    return shapes


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    return engine.basic_optimizer


def shards(engine: Any) -> Iterator[Shard]:
    """This rank's shards, for reading; all ranks call this.

    A shard on an NVMe disk is in memory only until the next one is requested.
    """
    yield from _shards(engine, changed=False)


@torch.no_grad()
def rewrite_shards(engine: Any) -> Iterator[Shard]:
    """This rank's shards, for writing; the model's own weights are updated. All ranks must exhaust this."""
    yield from _shards(engine, changed=True)


def scalars_of(shard: Shard) -> dict[str, Any]:
    """The numbers in a shard's state as JSON: a number, or ``[number, dtype]`` for a tensor without dimensions."""
    found: dict[str, Any] = {}
    for key, value in shard.state.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            found[key] = [value.item(), str(value.dtype).removeprefix("torch.")]
        elif isinstance(value, int | float):
            found[key] = value
    return found


def set_scalars(engine: Any, shard: Shard, scalars: dict[str, Any], *, same_optimizer: bool) -> None:
    """Restore what :func:`scalars_of` returned of an optimizer of the same method, in the types of this one.

    ``same_optimizer`` says whether that optimizer had the same class, too.
    """
    base = base_optimizer(engine)
    for key, saved in scalars.items():
        value, dtype = saved if isinstance(saved, list) else (saved, None)
        if not same_optimizer:  # torch's Adams count in tensors, DeepSpeed's in integers
            value, dtype = (float(value), "float32") if isinstance(base, torch.optim.Adam) else (int(value), None)
        # torch's fused Adam needs its step count on the device of the weights; other optimizers accept that.
        device = shard.values.device
        shard.state[key] = torch.tensor(value, dtype=getattr(torch, dtype), device=device) if dtype else value
    if "step" in scalars:
        for group in base.param_groups:
            if "step" in group or type(base).__name__ == "FusedAdam":  # DeepSpeed's FusedAdam counts steps by group
                group["step"] = steps_of(scalars)


def steps_of(scalars: dict[str, Any]) -> int:
    """Number of optimizer steps in ``scalars`` from :func:`scalars_of`; 0 where the optimizer does not count."""
    step = scalars.get("step", 0)
    return int(step[0] if isinstance(step, list) else step)


def state_dtype(engine: Any, shard: Shard, key: str, saved: torch.dtype) -> torch.dtype:
    """The dtype in which the optimizer of this run keeps a state that was saved as ``saved``."""
    base: Any = base_optimizer(engine)
    if key not in ("exp_avg", "exp_avg_sq"):
        return saved
    if isinstance(base, torch.optim.Adam):
        return shard.values.dtype
    if hasattr(base, "fp32_optimizer_states"):  # DeepSpeedCPUAdam
        return torch.float32 if base.fp32_optimizer_states else shard.values.dtype
    return saved


def replay_steps(engine: Any, steps: set[int]) -> None:
    """Restore the powers of beta that DeepSpeedCPUAdam keeps in C++ to the last bit, from its step counts.

    It multiplies them step by step, and recomputes them (with another last bit) when a step count does not follow the
    previous one. Where shards have different counts it always recomputes them, and there is nothing to restore.
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
    names = {parameter: saved_name(name, parameter) for name, parameter in engine.module.named_parameters()}
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
    """Stage 0 in fp32: the optimizer updates the parameters themselves."""
    for group in base.param_groups:
        for parameter in group["params"]:
            yield Shard(parameter, base.state[parameter], (_whole(names[parameter], parameter),), replicated=True)


def _half_precision(
    optimizer: Any, base: torch.optim.Optimizer, names: dict[Tensor, str], *, changed: bool
) -> Iterator[Shard]:
    """Stage 0 in half precision: fp32 copies, of each group for DeepSpeed's FusedAdam, else of each parameter."""
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
    """Each group is one flat tensor, of which each rank has an equal slice; a parameter may be on two ranks."""
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
    """Each parameter is partitioned into equal slices, padded at the end; a sub-group of slices is one flat tensor."""
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
