"""How a process that trains in one way takes its turns: orders on standard input, answers on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from operator_calls import Calls


def orders() -> Iterator[int]:
    """How many steps to take next."""
    print("ready", flush=True)
    for line in sys.stdin:
        order = line.strip()
        if order == "count":
            watching.append(Calls().__enter__())
        elif order == "profile":
            watching.append(profiler().__enter__())
        yield 1 if watching else int(order)


watching: list[Any] = []  # what counts or profiles the turn, if anything does


def profiler() -> torch.profiler.profile:
    """Records what the GPU does; without one, what the CPU does."""
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU])


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
        more |= seen(watch, seconds)
    watching.clear()
    print(json.dumps({"clips": clips, "seconds": seconds, **more}), flush=True)


def seen(watch: Any, seconds: float) -> dict[str, Any]:
    """Counts of a turn; or the share of the time that the GPU was busy, what was launched, and the most memory."""
    if isinstance(watch, Calls):
        waits = [[*key, count] for key, count in sorted(watch.waits.items())]
        return {"operators": watch.total, "kernels": watch.kernels, "waits": waits}
    if not torch.cuda.is_available():
        return {}
    spans = [(e.time_range.start, e.time_range.end) for e in watch.events() if e.device_type.name == "CUDA"]
    peak = torch.cuda.max_memory_allocated() / 2**30
    busy = covered(spans) / 1e6 / seconds
    return {"busy": round(busy, 3), "launches_a_step": len(spans), "peak_gib": round(peak, 2)}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of what spans cover together: kernels of several streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
