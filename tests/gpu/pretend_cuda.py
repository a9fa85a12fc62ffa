"""torch.cuda and tensors of a machine whose GPUs are pretended; ``pretend_gpus.py`` says what for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Rank:
    """This process, as far as devices go."""

    gpus = 2  # that it sees
    own = torch.device("cuda", 0)  # where it computes
    current = 0  # GPU 0 until the rank changes it


class WrongDevice(BaseException):
    """Something is on another device than the rank's; no handler of ours takes it for an error that it knows."""

    def __init__(self, what: str) -> None:
        super().__init__(f"rank {os.environ.get('RANK', '0')} computes on {Rank.own}: {what}")


def meant(device: Any) -> torch.device:
    """The device that is asked for, which must be the CPU, the rank's own GPU, or none ("meta")."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", Rank.current)
    if device.type == "cuda" and device != Rank.own:
        raise WrongDevice(f"{device} is asked for")
    return device


def set_device(device: Any) -> None:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = Rank.current if device.index is None else device.index
    if not 0 <= index < Rank.gpus:
        raise WrongDevice(f"cuda:{index} is made the current device, of {Rank.gpus}")
    if index != Rank.own.index:
        raise WrongDevice(f"cuda:{index} is made the current device")
    Rank.current = index


@contextmanager
def on_device(device: Any) -> Iterator[None]:
    if device is not None and not (isinstance(device, int) and device < 0):
        meant(device)
    yield


class Moment:
    """A stream or an event: there is only one order of things."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = Rank.own

    def __enter__(self) -> Moment:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> Moment:
        return self

    record = wait = synchronize = wait_stream = wait_event = nothing


def pretend_cuda() -> None:
    """Let ``torch.cuda`` report GPUs."""
    gib = 2**30
    properties = SimpleNamespace(name="pretended", total_memory=80 * gib, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": Rank.gpus,
        "get_device_name": "pretended",
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "mem_get_info": (70 * gib, 80 * gib),
        "initial_seed": 0,
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), gib),
        "memory_stats": {},
        "memory_stats_as_nested_dict": {},
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")),
        **dict.fromkeys(("set_rng_state", "_lazy_init", "init")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.current_device = lambda: Rank.current
    torch.cuda.set_device = set_device
    torch.cuda.device = torch.cuda.device_of = torch.cuda._DeviceGuard = lambda what: on_device(
        device_of(what) if isinstance(what, Tensor) else what
    )
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.Stream = torch.cuda.Event = Moment  # type: ignore[misc]
    torch.cuda.current_stream = torch.cuda.default_stream = torch.cuda.stream = Moment
    torch.cuda.nvtx = SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None)


def note_of(tensor: Tensor) -> torch.device | None:
    """Where a tensor claims to be; None where nothing of Python made its storage."""
    if tensor.is_meta:
        return None
    return getattr(tensor.untyped_storage(), "pretended", None)


def take_note(tensor: Tensor, device: torch.device) -> None:
    if not tensor.is_meta:
        tensor.untyped_storage().pretended = device  # type: ignore[attr-defined]


def device_of(tensor: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return note_of(tensor) or tensor.device


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def kind_of(tensor: Tensor) -> str:
    return tensor.type().replace("torch.", "torch.cuda.", 1) if note_of(tensor) == Rank.own else tensor.type()


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, which copies from device to device."""
    words = list(args)
    device = kwargs.pop("device", None)
    if words and isinstance(words[0], Tensor):
        other = words.pop(0)
        device, kwargs["dtype"] = note_of(other) or other.device, other.dtype
    elif words and isinstance(words[0], (str, int, torch.device)):
        device = words.pop(0)
    elif words and words[0] is None:
        words.pop(0)
    note = note_of(tensor)
    if device is None:
        result = tensor.to(*words, **kwargs)
        if note:
            take_note(result, note)
        return result
    wanted = meant(device)
    if wanted.type == "meta":
        return tensor.to(wanted, *words, **kwargs)
    if (note or CPU) != wanted:
        kwargs["copy"] = True
    result = tensor.to(CPU, *words, **kwargs)
    take_note(result, wanted)
    return result


def no_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if note_of(tensor) == Rank.own:
        raise WrongDevice("NumPy is given a tensor of the GPU")
    return tensor.numpy(*args, **kwargs)


def grad_of(tensor: Tensor) -> Tensor | None:
    gradient = tensor.grad
    note = note_of(tensor)
    if gradient is not None and note and note_of(gradient) is None:
        take_note(gradient, note)
    return gradient


HANDLED: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda tensor: note_of(tensor) or tensor.device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda tensor: note_of(tensor) == Rank.own,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda tensor: not tensor.is_meta and note_of(tensor) != Rank.own,  # type: ignore[attr-defined]
    Tensor.get_device: lambda tensor: Rank.own.index if note_of(tensor) == Rank.own else -1,
    Tensor.grad.__get__: grad_of,  # type: ignore[attr-defined]
    Tensor.to: to,
    Tensor.cuda: lambda tensor, device=None, **_: to(tensor, "cuda" if device is None else device),
    Tensor.cpu: lambda tensor, **_: to(tensor, "cpu"),
    Tensor.pin_memory: lambda tensor, *_: tensor,
    Tensor.is_pinned: lambda tensor, *_: False,
    Tensor.numpy: no_numpy,
}
# Operations that take tensors of several devices: copies, indices that lie on the CPU, what swaps a tensor's inside.
ACROSS = {
    *(Tensor.copy_, Tensor.set_, Tensor.data.__set__, Tensor.grad.__set__),  # type: ignore[attr-defined]
    *(Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.type_as),
    torch._has_compatible_shallow_copy_type,
}


class Pretence(TorchFunctionMode):
    """Sees every operation of torch that Python calls."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # which needs a real GPU
        if function is Tensor.type and len(args) == 1 and not kwargs:
            return kind_of(args[0])
        if handler := HANDLED.get(function):
            return handler(*args, **kwargs)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        asked = kwargs.get("device")
        if asked is not None:
            wanted = meant(asked)
            if wanted.type == "meta":
                return function(*args, **kwargs)
            kwargs = {**kwargs, "device": CPU}
        else:
            notes = {note for tensor in inputs if (note := note_of(tensor))}
            large = {note for tensor in inputs if tensor.dim() and (note := note_of(tensor))}
            if len(large) > 1 and function not in ACROSS:
                raise WrongDevice(f"{function} computes with tensors of {', '.join(sorted(map(str, large)))}")
            wanted = Rank.own if Rank.own in notes else CPU
            if not notes and inputs:
                return function(*args, **kwargs)  # of nobody knows where
        result = function(*args, **kwargs)
        for tensor in tensors_in(result):
            if note_of(tensor) is None or (asked is not None and note_of(tensor) != wanted):
                take_note(tensor, wanted)
        return result


def pretend_tensors() -> None:
    """Let hooks of a backward pass be seen, too: torch leaves the mode for all that it calls by itself."""
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def seen(*args: Any, **kwargs: Any) -> Any:
        if isinstance(torch.overrides._get_current_function_mode(), Pretence):
            return run(*args, **kwargs)
        with Pretence():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = seen  # type: ignore[attr-defined]
    Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign,assignment]
