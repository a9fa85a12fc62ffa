"""Which part of a parameter a rank holds where DeepSpeed's AutoTP has split it, and the way to whole ones and back.

Consecutive ranks form a group that holds one copy of a model together: ranks 0 and 1, ranks 2 and 3. What is not split
is whole on each of them, and alike. Ranks in the same place of their groups share gradients and ZeRO's partitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from toolkit.cluster.ranks import Ranks

PART = "tensor_parallel_part"  # attribute of a parameter


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a rank holds; all parts are equal in size."""

    dim: int  # dimension of the parameter that is split
    number: int  # place of this part
    of: int  # how many parts there are
    group: Any  # process group of the ranks that hold the others


def ranks_of(module: nn.Module) -> Ranks:
    """The ranks of the process group, as a model is divided among them."""
    size = next((part.of for _, _, part in parts_by_name(module)), 1)
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), tensor_parallel_size=size)


def make_groups(size: int) -> Any:
    """Form the groups of so many consecutive ranks, and those of ranks in the same place; gives DeepSpeed's module."""
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(size)
    return groups


def note_parts(module: nn.Module, planned: Iterable[nn.Parameter]) -> None:
    """Remember on each parameter that AutoTP has split which part it is; those that were ``planned`` must be."""
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
    from deepspeed.utils import groups

    for parameter in module.parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            group = groups.get_tensor_model_parallel_group()
            dim = getattr(parameter, DS_AUTOTP_UC_META)["partition_dim"]
            setattr(parameter, PART, Part(dim, dist.get_rank(group), dist.get_world_size(group), group))
    if whole := sum(part_of(parameter) is None for parameter in planned):
        raise AssertionError(f"AutoTP has left {whole} weights whole that it was to split")


def part_of(tensor: Tensor | None) -> Part | None:
    """Which part of a parameter this tensor is; None where it is whole."""
    part: Part | None = getattr(tensor, PART, None)
    return part


def parts_by_name(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Part]]:
    """The parameters that are split."""
    for name, parameter in module.named_parameters():
        if part := part_of(parameter):
            yield name, parameter, part


def whole_shape(tensor: Tensor) -> torch.Size:
    """Shape of the whole parameter of which this is a part, or the whole."""
    sizes, part = list(tensor.shape), part_of(tensor)
    if part:
        sizes[part.dim] *= part.of
    return torch.Size(sizes)


def whole(tensor: Tensor) -> Tensor:
    """The whole parameter; all ranks of a group call this."""
    if not (part := part_of(tensor)):
        return tensor.detach()
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(part.of)]
    dist.all_gather(parts, own, group=part.group)
    return torch.cat(parts, dim=part.dim)


def own_part(tensor: Tensor, values: Tensor) -> Tensor:
    """Of the values of the whole parameter those of the part that ``tensor`` is."""
    part = part_of(tensor)
    return values.chunk(part.of, dim=part.dim)[part.number] if part else values


def total_norm(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Norm of whole gradients, of which this rank has those of its own ``weights``; all ranks of a group call this."""
    split = [gradient for gradient, weight in zip(gradients, weights, strict=True) if part_of(weight)]
    if not split:
        return nn.utils.get_total_norm(gradients, foreach=True)
    alike = [gradient for gradient, weight in zip(gradients, weights, strict=True) if not part_of(weight)]
    group = next(part.group for weight in weights if (part := part_of(weight)))
    squares = nn.utils.get_total_norm(split, foreach=True).square()
    dist.all_reduce(squares, group=group)
    return (squares + nn.utils.get_total_norm(alike, foreach=True).square()).sqrt()
