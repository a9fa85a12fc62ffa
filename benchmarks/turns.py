"""How a process that trains in one way takes its turns: orders on standard input, answers on standard output."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from operator_calls import Calls

# torch's operators that compute matrix products and convolutions on a CPU.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution_backward")

# Functions of CUDA that start something on a GPU, as the profiler names them.
STARTS = (
    *("cudaLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"),
    *("cuLaunch", "cuGraphLaunch", "cuMemcpy", "cuMemset"),
)


def orders() -> Iterator[int]:
    """How many steps to take next: ``4``, ``count`` (one, counted), ``profile 4``, ``launches 4``, ``traffic 4``."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, *rest = line.split()
        if name in WATCHES:
            watching.append(WATCHES[name]().__enter__())
        yield int(rest[0]) if rest else 1 if watching else int(name)


watching: list[Any] = []  # what counts or profiles the turn, if anything does


def is_profiled() -> bool:
    """Whether the turn that is taken is profiled."""
    return any(isinstance(watch, Profile) for watch in watching)


class Profile:
    """Records what the GPU does in a turn; without one, what the CPU does."""

    def __init__(self) -> None:
        activity = torch.profiler.ProfilerActivity
        self.own = torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU])

    def __enter__(self) -> Profile:
        self.own.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.own.__exit__(*error)

    def products(self) -> float:
        """Seconds that the CPU was in matrix products and convolutions."""
        return sum(event.self_cpu_time_total for event in self.own.key_averages() if event.key in PRODUCTS) / 1e6

    def launches(self) -> int:
        """How often the host started a kernel, a copy or a whole graph."""
        events = self.own.profiler.kineto_results.events()  # type: ignore[union-attr]
        # A call of the runtime and that of the driver within it have one number.
        return len({event.correlation_id() for event in events if event.name().startswith(STARTS)})

    def spans(self) -> list[tuple[float, float]]:
        """From when to when the GPU ran each kernel or copy, in seconds."""
        events = self.own.profiler.kineto_results.events()  # type: ignore[union-attr]
        on_gpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
        ours = [event for event in on_gpu if not event.is_user_annotation()]  # which spans kernels and the time between
        return [(event.start_ns() / 1e9, event.end_ns() / 1e9) for event in ours]


class Launches:
    """Counts the calls of the pretended CUDA runtime (tests/pretended_cuda) in a turn, by kind."""

    def __enter__(self) -> Launches:
        self.before = pretended_counts()
        self.calls: dict[str, int] = {}
        return self

    def __exit__(self, *error: Any) -> None:
        self.calls = {name: number - self.before[name] for name, number in pretended_counts().items()}


# What an order may name in front of its steps; ``traffic_side.py`` adds one.
WATCHES: dict[str, Any] = {"count": Calls, "profile": Profile, "launches": Launches}


def pretended_counts() -> dict[str, int]:
    counts: dict[str, int] = importlib.import_module("pretended_operators").counts()
    return counts


def elapsed(started: float) -> float:
    """Seconds since then, when the GPU has done all that it was given; the turn's last call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for watch in watching:
        watch.__exit__(None, None, None)
    return seconds


def answer(clips: int, seconds: float, **more: Any) -> None:
    """Answer an order; a turn that was watched says what was seen."""
    for watch in watching:
        more = seen(watch, seconds) | more
    watching.clear()
    print(json.dumps({"clips": clips, "seconds": seconds, **more}), flush=True)


def seen(watch: Any, seconds: float) -> dict[str, Any]:
    """Counts of a turn; or how long the GPU was busy, with how many kernels, copies and launches, where that was seen,
    and the most memory that the process used and held; without a GPU the share of the turn in which products were
    computed."""
    if isinstance(watch, Calls):
        waits = [[*key, count] for key, count in sorted(watch.waits.items())]
        return {"operators": watch.total, "kernels": watch.kernels, "waits": waits}
    if isinstance(watch, Launches):
        return {"calls": watch.calls}
    if not isinstance(watch, Profile):
        return dict(watch.seen())
    if not torch.cuda.is_available():
        return {"products_share": watch.products() / seconds}
    peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    found: dict[str, Any] = {name: round(peak / 2**30, 2) for name, peak in peaks.items()}
    spans = watch.spans()
    busy = covered(spans)
    if 0 < busy <= seconds:  # a profiler that may not ask the GPU sees nothing, and one whose clock is wrong too much
        found |= {"busy_seconds": busy, "kernels": len(spans), "launches": watch.launches()}
    return found


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of what spans cover together: kernels of several streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
