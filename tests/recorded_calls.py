"""A stand-in for CUDA graphs on any device: it records operator calls, and computes them again in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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

        def replay() -> None:
            self.replays += 1
            result.copy_(recorder.again(result))

        return result, replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def again(self, wanted: Tensor) -> Tensor:
        """Compute all calls again; gives what replaces a tensor of the recording."""
        made: dict[int, Tensor] = {}

        def now(tensor: Tensor) -> Tensor:
            return made.get(id(tensor), tensor)

        for function, args, kwargs, found in self.calls:
            args, kwargs = tree_map_only(Tensor, now, (args, kwargs))
            results = function(*args, **kwargs)
            olds, news = ([item] if isinstance(item, Tensor) else item for item in (found, results))
            for old, new in zip(olds or (), news or (), strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new
        return now(wanted)
