"""Process groups of a machine whose GPUs are pretended: gloo, taken for NCCL, where no one says that gloo is meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pretend_cuda import Rank, WrongDevice, device_of, meant, note_of, tensors_in
from torch import distributed as dist

COLLECTIVES = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter"),
    *("reduce_scatter_tensor", "all_to_all_single", "gather", "scatter", "send", "recv", "isend", "irecv"),
)


OF_GLOO: set[int] = set()  # the groups for which gloo was asked


def is_nccl(group: Any) -> bool:
    return id(group) not in OF_GLOO


def pretend_nccl() -> None:
    """Let gloo stand for NCCL, which takes tensors of the rank's GPU alone."""
    begin, new, wait = dist.init_process_group, dist.new_group, dist.barrier

    def init_process_group(backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        bound = None if device_id is None else meant(device_id)
        begin("gloo", *args, **kwargs)
        dist.group.WORLD.bound_device_id = bound

    def new_group(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        group = new(*args, backend=backend, **kwargs)
        if backend == "gloo":
            OF_GLOO.add(id(group))
        return group

    def barrier(group: Any = None, async_op: bool = False, device_ids: list[int] | None = None, **_: Any) -> Any:
        if is_nccl(group):
            bound = dist.group.WORLD.bound_device_id
            if device_ids:
                meant(device_ids[0])
            elif bound is None and not seen:
                raise WrongDevice("a barrier guesses its device")
            seen.append(Rank.own)
        group = group or dist.group.WORLD
        bound, group.bound_device_id = group.bound_device_id, None  # gloo would take memory there
        try:
            return wait(group, async_op)
        finally:
            group.bound_device_id = bound

    seen: list[torch.device] = []  # by NCCL, which then need not guess any more
    dist.init_process_group, dist.new_group, dist.barrier = init_process_group, new_group, barrier

    def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def collective(*args: Any, **kwargs: Any) -> Any:
            if is_nccl(signature.bind(*args, **kwargs).arguments.get("group")):
                for tensor in [*tensors_in(args), *tensors_in(kwargs)]:
                    if note_of(tensor) not in (Rank.own, None):
                        raise WrongDevice(f"{name} is given a tensor of {device_of(tensor)}")
                seen.append(Rank.own)
            return function(*args, **kwargs)

        return collective

    def pickling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def collective(*args: Any, **kwargs: Any) -> Any:
            group = signature.bind(*args, **kwargs).arguments.get("group")
            if is_nccl(group) and Rank.current != Rank.own.index:
                raise WrongDevice(f"{name} goes over cuda:{Rank.current}")
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return collective

    for name in COLLECTIVES:
        setattr(dist, name, checked(name, getattr(dist, name)))
    for name in ("all_gather_object", "broadcast_object_list", "gather_object"):
        setattr(dist, name, pickling(name, getattr(dist, name)))
