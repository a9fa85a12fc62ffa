"""What tests of benchmarks/gpu.py put in place of a machine, of its clock and of the processes that train."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

H100 = {"device": "H100", "torch": "2.13", "driver": "580"}


def rows_of(gpu: ModuleType) -> ModuleType:
    """The module of its rows."""
    return sys.modules[gpu.Row.__module__]


class Machine:
    """A clock that runs while rows are measured, each as long as it says; rows in ``broken`` fail."""

    def __init__(self, gpu: ModuleType, path: Path) -> None:
        self.gpu, self.path, self.now = gpu, path, 100.0
        self.broken: set[str] = set()
        self.found: dict[str, Any] = {}  # of each row that is measured
        self.stop = gpu.Stop()
        self.stopped_in = ""  # row that a signal ends
        self.limits: list[float] = []
        self.written: list[list[str]] = []  # rows in the file when each measurement began
        self.rows = [gpu.Row(name, seconds, None) for name, seconds in (("a", 60), ("b", 90), ("c", 30))]

    def __call__(self, row: Any, seconds: float) -> dict[str, Any]:
        self.written.append(list(self.results()))
        self.limits.append(seconds)
        self.now += row.seconds
        if row.name in self.broken:
            raise RuntimeError("out of memory")
        if row.name == self.stopped_in:
            self.stop.name = "SIGINT"
        return dict(self.found) or {"clips_per_second": row.seconds}

    def seconds(self, row: Any) -> float:
        return float(row.seconds)

    def results(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def take(self, minutes: float, device: dict[str, str] = H100, again: bool = False) -> list[str]:
        rows = self.rows if again else self.gpu.missing(self.rows, self.results(), device)
        ends = self.now + 60 * minutes
        left: list[str] = self.gpu.take(rows, self.path, device, ends, self, stop=self.stop, clock=lambda: self.now)
        return left


class Sides:
    """Stands in for the processes of training rows: a turn takes a hundredth of a second a step, profiled or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.broken: dict[str, int] = {}  # setting of a side -> turns before it ends
        self.running, self.most = 0, 0
        self.limits: set[float] = set()  # of starts and turns, in seconds
        self.taken: dict[tuple[str, str], list[int | str]] = {}  # orders of each recipe and first setting
        self.sees_gpu = True
        self.captured = 0
        self.hangs_at = ("", "", 0)  # recipe, setting, number of the turn
        monkeypatch.setattr(module, "started", self.started)
        monkeypatch.setattr(module, "take_turn", self.take_turn)
        self.over: threading.Event = sys.modules["sides"]._is_over

    @contextmanager
    def started(self, command: list[str], limit: float) -> Iterator[list[str]]:
        self.limits.add(limit)
        self.running += 1
        self.most = max(self.most, self.running)
        yield command
        self.running -= 1

    def take_turn(self, command: list[str], order: int | str, limit: float) -> dict[str, Any]:
        self.limits.add(limit)
        for setting, left in self.broken.items():
            if setting in command:
                self.broken[setting] -= 1
                if not left:
                    raise SystemExit("ended during its turn")
        recipe = command[command.index("--recipe") + 1]
        self.taken.setdefault((recipe, command[3]), []).append(order)
        if self.hangs_at == (recipe, command[3], len(self.taken[recipe, command[3]])):
            self.over.wait()
        if self.over.is_set():
            raise SystemExit("no time was left")
        steps = int(str(order).split()[-1])
        # The first batches of an epoch are slower than the others.
        seconds = 0.01 * steps + 0.1 * min(steps, 32)
        turn = {
            "clips": 128 * steps,
            "seconds": seconds,
            "mfu": 0.5,
            "product_tflops": 700.0,
            "captured": self.captured,
            "compiled": 4,
        }
        self.captured += "compile=graphs" in command and steps > 32
        found = turn | {"peak_gib": 2.0, "planned_gib": 2.1}
        return found | (
            {"busy_seconds": 0.4 * seconds, "kernels": 256 * steps, "launches": 128 * steps} if self.sees_gpu else {}
        )


def measuring(gpu: ModuleType, rows: list[Any], folder: Path) -> Any:
    return closing(gpu.Measuring(rows, folder, False, 100.0))


def two_rows(gpu: ModuleType, gib: float = 40.0) -> list[Any]:
    ways = {"ours": ("ours", "micro=8"), "ours_graphs": ("ours", "compile=graphs"), "hf_16": ("hf", "micro=16")}
    names = (("t5_small", 16), ("t5_base", 128))
    return [gpu.Row(name, 60, gpu.Training(name, clips, gib, ways)) for name, clips in names]
