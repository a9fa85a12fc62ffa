"""A stand-in for CUDA graphs on any device: it records operator calls, and computes them again in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.scripts import load_script


class RecordedCalls:
    """Captures calls as ``toolkit.decoding.step_graphs.Capture``; what Python computes stays as it was captured.

    Attributes:
        captured: operator calls of each capture.
        replays: how often captured calls were computed again.
    """

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replays = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        call()  # as the first call outside a capture, so that repeating one is tried
        waits = load_script("benchmarks/operator_calls.py").Calls()
        with waits, _Recorder() as recorder:
            result = call()
        if waits.waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {dict(waits.waits)}")
        self.captured.append(len(recorder.calls))
        again = recorder.repeated(result)

        @torch.no_grad()  # autograd's own calls are among those that were recorded
        def replay() -> None:
            self.replays += 1
            result.copy_(again())

        return result, replay


@dataclass(frozen=True)
class _Made:
    """Stands for a tensor that a recorded call has made."""

    number: int


@dataclass(frozen=True)
class _Call:
    """One operator call.

    Attributes:
        made: number of each tensor that it makes; None for what is no tensor, or was there before.
    """

    function: Any
    args: Any
    kwargs: Any
    made: list[int | None]


class _Recorder(TorchDispatchMode):
    """Keeps calls and the tensors that were there before them; what the calls made is free when the recording ends."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._numbers: dict[int, int] = {}  # id of a tensor that a call has made -> its number
        self._held: list[Tensor] = []  # so that no id is used twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        known = tree_map_only(Tensor, self.standing_for, (args, kwargs or {}))
        there = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        self.calls.append(_Call(function, *known, [self._made(item, there) for item in _listed(found)]))
        return found

    def standing_for(self, tensor: Tensor) -> Any:
        """What a recorded call holds of a tensor: the tensor itself where it was there before."""
        number = self._numbers.get(id(tensor))
        return tensor if number is None else _Made(number)

    def _made(self, result: Any, there: set[int]) -> int | None:
        if not isinstance(result, Tensor) or id(result) in there:  # changed in place
            return None
        self._held.append(result)
        return self._numbers.setdefault(id(result), len(self._held))

    def repeated(self, wanted: Tensor) -> Callable[[], Tensor]:
        """End the recording; gives what computes all calls again, and with them what replaces ``wanted``."""
        calls, last = self.calls, self.standing_for(wanted)
        ends: dict[int, int] = {}  # number of a tensor -> place of the last call that makes or reads it
        for place, call in enumerate(calls):
            read = (item.number for item in tree_leaves((call.args, call.kwargs)) if isinstance(item, _Made))
            ends |= dict.fromkeys((*read, *(number for number in call.made if number is not None)), place)
        over: list[list[int]] = [[] for _ in calls]
        for number, place in ends.items():
            if _Made(number) != last:
                over[place].append(number)
        self._numbers.clear()
        self._held.clear()

        def again() -> Tensor:
            values: dict[int, Tensor] = {}

            def now(made: _Made) -> Tensor:
                return values[made.number]

            for call, done in zip(calls, over, strict=True):
                args, kwargs = tree_map_only(_Made, now, (call.args, call.kwargs))
                results = _listed(call.function(*args, **kwargs))
                values |= {number: item for number, item in zip(call.made, results, strict=True) if number is not None}
                for number in done:
                    del values[number]
            return now(last) if isinstance(last, _Made) else last

        return again


def _listed(results: Any) -> Sequence[Any]:
    """The tensors that a call gives; none where it gives a number."""
    return [results] if isinstance(results, Tensor) else results if isinstance(results, list | tuple) else ()
