"""One operator of torch for GPUs, computed by the CPU; a capture records it, and each replay computes it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from pretended_operators import freed, generators, runtime
from pretended_operators.host_memory import extent, on_device, on_host

# Their results, or the shapes of these, are known on the host.
WAITING = frozenset(
    {
        *("nonzero", "masked_select", "equal", "is_nonzero", "_unique", "_unique2", "unique_dim", "bincount", "histc"),
        *("unique_consecutive", "unique_dim_consecutive", "repeat_interleave"),
    }
)
INDEXING = frozenset({"index", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})
# Written although their schema does not say so.
ALSO_WRITTEN = dict.fromkeys(
    ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), ("running_mean", "running_var")
)
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
LARGEST_PRODUCT = 2**25  # elements of each matrix; products of larger ones measure speed


def computed(operator: Any, compute: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A kernel for GPUs of an operator: its own kernel for CPUs, or another function of tensors of the CPU.

    Args:
        operator: the overload.
        compute: instead of the operator itself, where that has no kernel for CPUs.
    """
    schema = operator._schema
    name = schema.name.removeprefix("aten::")
    names = [argument.name for argument in schema.arguments]
    written = _written(schema) | set(ALSO_WRITTEN.get(name, ()))
    is_same = _returned_arguments(schema)
    takes_tensor = [_is_tensor(argument.type) for argument in schema.arguments]
    is_number_taken = compute is None and torch._C._should_allow_numbers_as_tensors(name)
    act = compute or operator

    def kernel(*given: Any, **more: Any) -> Any:
        named = dict(zip(names, given, strict=False)) | more
        device = _device(named)
        stream = runtime.current_stream(device)
        is_captured = runtime.is_capturing(stream)
        if _waits(name, named):
            runtime.wait(stream)
        is_drawn = generators.draws(name, named, "generator" in names)
        if is_drawn:
            generators.draw(device, named.get("generator"))
        if name in PRODUCTS:
            torch._C._cuda_getCurrentBlasHandle()  # takes the workspace that a product of torch has
            if _measures_speed(named):
                runtime.launch(stream)
                return _not_computed(named, device)

        def as_host(place: int, value: Any) -> Any:
            if isinstance(value, int | float | bool) and takes_tensor[place] and not is_number_taken:
                return torch.tensor(value)
            # A kernel gets a number of the host by value: replays see that of the capture.
            is_frozen = is_captured and names[place] not in written
            return _pytree.tree_map(
                lambda leaf: leaf.clone() if is_frozen and _is_host_number(leaf) else on_host(leaf), value
            )

        arguments = [as_host(place, value) for place, value in enumerate(given)]
        options = {key: as_host(names.index(key), value) for key, value in more.items()}
        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        if "generator" in options:
            options["generator"] = None
        if is_captured:
            for tensor in _tensors(named[key] for key in written if key in named):
                if tensor.device.type == "cuda":
                    runtime.keep(stream, *extent(tensor))
        found = act(*arguments, **options)
        found = list(found) if len(is_same) > 1 else [found][: len(is_same)]
        _take_shapes(names, named, written, arguments, options)

        fresh: list[Tensor] = []

        def as_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            fresh.append(on_device(value, device))
            return fresh[-1]

        results = [
            named[same] if same is not None else _pytree.tree_map(as_device, value)
            for value, same in zip(found, is_same, strict=True)
        ]
        if is_captured:
            _record(stream, operator, _tensors(named.values()), act, arguments, options, is_same, fresh)
        elif not is_drawn:  # its kernel is counted already
            runtime.launch(stream)
        return tuple(results) if len(results) > 1 else results[0] if results else None

    return kernel


def _record(
    stream: int,
    operator: Any,
    read: list[Tensor],
    act: Callable[..., Any],
    arguments: list[Any],
    options: dict[str, Any],
    is_same: list[str | None],
    fresh: list[Tensor],
) -> None:
    """Let each replay compute again, from and into the same memory, which nothing here keeps from being used again."""
    targets = [on_host(tensor) for tensor in fresh]
    check = freed.check_of(operator, read)

    def again() -> None:
        check()
        with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
            found = act(*arguments, **options)
            found = list(found) if len(is_same) > 1 else [found][: len(is_same)]
            new = _tensors(value for value, same in zip(found, is_same, strict=True) if same is None)
            for target, value in zip(targets, new, strict=True):
                target.copy_(value)

    runtime.record(stream, again)


def _take_shapes(
    names: list[str], named: dict[str, Any], written: set[str], arguments: list[Any], options: dict[str, Any]
) -> None:
    """An operator may give a tensor that it writes another shape (``out=``): the tensor of the GPU gets it, too."""
    for key in written & named.keys():
        ours, place = named[key], names.index(key)
        host = options[key] if key in options else arguments[place]
        if isinstance(ours, Tensor) and ours.device.type == "cuda" and host.shape != ours.shape:
            ours.resize_(host.shape)
            new = on_host(ours).copy_(host)
            if key in options:
                options[key] = new
            else:
                arguments[place] = new


def _written(schema: Any) -> set[str]:
    infos = ((argument.name, argument.alias_info) for argument in schema.arguments)
    return {name for name, info in infos if info is not None and info.is_write}


def _returned_arguments(schema: Any) -> list[str | None]:
    """For each result the argument that it is; None where it is new."""
    by_set = {
        one: argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for one in argument.alias_info.before_set
    }
    infos = [result.alias_info for result in schema.returns]
    return [next((by_set[one] for one in info.before_set if one in by_set), None) if info else None for info in infos]


def _is_tensor(kind: Any) -> bool:
    return "Tensor" in str(kind) and "List" not in str(kind)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def _device(named: dict[str, Any]) -> torch.device:
    """Of the tensors, or the one that is asked for."""
    found = [tensor.device for tensor in _tensors(named.values()) if tensor.device.type == "cuda"]
    asked = torch.device(named.get("device") or "cuda")
    return found[0] if found else torch.device("cuda", torch.cuda.current_device()) if asked.index is None else asked


def _is_host_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu"


def _waits(name: str, named: dict[str, Any]) -> bool:
    if name in WAITING:
        return named.get("output_size") is None and named.get("size") is None
    if name not in INDEXING:
        return False
    indices = _tensors([named["indices"]])
    value = named.get("values")
    # A number of the host, written by one mask, is written without a look at how many places there are.
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu" and not named.get("accumulate"):
        return False
    return any(index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu" for index in indices)


def _measures_speed(named: dict[str, Any]) -> bool:
    matrices = [value for value in named.values() if isinstance(value, Tensor) and value.dim() >= 2]
    return bool(matrices) and min(matrix.numel() for matrix in matrices) > LARGEST_PRODUCT


def _not_computed(named: dict[str, Any], device: torch.device) -> Tensor:
    if named.get("out") is not None:
        return named["out"]
    left, right = (named[key] for key in (("mat1", "mat2") if "mat1" in named else ("self", "mat2")))
    return torch.empty(*left.shape[:-1], right.shape[-1], dtype=left.dtype, device=device)
