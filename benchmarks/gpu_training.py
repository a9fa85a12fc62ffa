"""Ways of training that take turns on one machine, for ``gpu.py``: each is a process that builds its model once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sides import in_short, started, take_turn

HERE = Path(__file__).resolve().parent
ROUNDS = 3
TRAINED = 2048  # clips of an epoch
STEPS = 64  # of a turn, at most: as many as loops that have their batches ready hold
OF_PEER = 256  # clips of a turn of Seq2SeqTrainer, whose batches are not sorted by length and all alike
LONGEST = 5.0  # seconds after which a side takes no further turn
PROFILED = 32  # micro-batches, at most: the profiler has two events for each of their kernels, and lists them for long
PROFILED_OF_PEER = 128  # clips: its kernels are many
THREADS = 4  # of a process, which builds its model beside those of the others
TOY = ["model.tiny=true", "training.workers=0", "model.pose_encoder.hidden=32", "ds.bf16.enabled=false"]


class Training(NamedTuple):
    """Clips a second of a recipe by several ways of training.

    Attributes:
        recipe: in recipes/.
        clips: of a global batch.
        gib: of GPU memory that all sides hold at the same time, at most, by plans and a rehearsal without a GPU; what
            each has held is ``reserved_gib`` of the results.
        sides: name in the results -> way of ``training_side.py``, and its settings.
    """

    recipe: str
    clips: int
    gib: float
    sides: dict[str, tuple[str, ...]]

    def commands(self, folder: Path, toy: bool) -> dict[str, list[str]]:
        """The command of each side."""
        shared = [
            f"model.tokenizer={folder / 'tokenizer'}",
            "model.from_scratch=true",
            f"training.global_batch_size={self.clips_of(toy)}",
            *(TOY if toy else []),
            *("--recipe", self.recipe, "--threads", str(min(THREADS, os.cpu_count() or 1)), "--same-batches"),
        ]
        script = str(HERE / "training_side.py")
        return {
            side: [script, way, str(folder), *of_toy(more, toy), *shared] for side, (way, *more) in self.sides.items()
        }

    def clips_of(self, toy: bool) -> int:
        return 8 if toy else self.clips

    def is_peer(self, side: str) -> bool:
        return self.sides[side][0] == "hf"

    def steps(self, side: str, toy: bool) -> int:
        """Of a turn: an epoch, whose batches are sorted by length, or a part of it; less of Seq2SeqTrainer."""
        if toy:
            return 2
        return min(STEPS, (OF_PEER if self.is_peer(side) else TRAINED) // self.clips)

    def profiled(self, side: str, toy: bool) -> int:
        """Steps of a turn that is profiled."""
        if self.is_peer(side):
            return min(self.steps(side, toy), max(1, PROFILED_OF_PEER // self.clips))
        sizes = [word.partition("=")[2] for word in self.sides[side] if word.startswith("training.micro_batch_size=")]
        passes = max(1, self.clips // int(sizes[0])) if sizes else 1
        return min(self.steps(side, toy), max(1, PROFILED // passes))

    def measure(self, processes: Processes, toy: bool) -> dict[str, Any]:
        """Turns of all sides, one at a time, every other round in the opposite order; then one that is profiled."""
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in self.sides}
        for number in range(1 if toy else ROUNDS):
            for side in processes.alive()[:: -1 if number % 2 else 1]:
                if sum(turn["seconds"] for turn in turns[side]) < LONGEST:
                    turns[side] += processes.turn(side, self.steps(side, toy))
        for side in processes.alive():
            steps = self.profiled(side, toy)
            # The same batches without a profiler; those of Seq2SeqTrainer are others in each turn, and all alike.
            beside = turns[side] if self.is_peer(side) else processes.turn(side, steps)
            profile = processes.turn(side, f"profile {steps}")
            processes.found[side] |= profiled_figures(beside, profile)
        found = {
            side: figures_of(taken, processes.first[side]) | processes.found[side]
            for side, taken in turns.items()
            if taken
        }
        for side, error in processes.failed.items():  # a side that has failed in its profile has its speed
            found[side] = found.get(side, {}) | error
        return {
            "clips_a_step": self.clips_of(toy),
            "sides": {side: found[side] for side in self.sides if side in found},
        }


class Processes:
    """Those of one row, which build their models, compile, capture and warm up at the same time as those of others.

    A side that takes longer than ``limit`` seconds to start, or for a turn, has failed: it hangs, and the others wait.

    Attributes:
        ready: name of a side -> its process.
        first: its first turns, which are no measure: their seconds, and what the last of them answered.
        found: what is known of it besides.
        failed: of those that have ended, why.
    """

    def __init__(self, row: Training, folder: Path, toy: bool, limit: float | None) -> None:
        self.row, self.toy, self.limit = row, toy, limit
        self.ready: dict[str, subprocess.Popen[str]] = {}
        self.first: dict[str, dict[str, Any]] = {}
        self.found: dict[str, dict[str, Any]] = {side: {} for side in row.sides}
        self.failed: dict[str, dict[str, Any]] = {}
        self.commands = row.commands(folder, toy)
        self.stack = ExitStack()

    def alive(self) -> list[str]:
        """Sides that can take a turn."""
        return [side for side in self.row.sides if side in self.ready]

    def open(self, side: str) -> None:
        """Start one side, and let it take its first turns.

        The first step of our own runs without graphs, and its shape may be that of no other: it is a turn by itself.
        """
        try:
            self.ready[side] = self.stack.enter_context(started(self.commands[side], limit=self.limit))
        except SystemExit as error:
            self.failed[side] = {"error": in_short(error)}
            return
        taken = [turn for steps in (1, self.row.steps(side, self.toy)) for turn in self.turn(side, steps)]
        if taken:
            self.first[side] = taken[-1] | {"seconds": sum(turn["seconds"] for turn in taken)}

    def turn(self, side: str, order: int | str) -> list[dict[str, Any]]:
        """What a side answers; nothing, where it fails, and from then on it is not ready."""
        if side not in self.ready:
            return []
        try:
            return [take_turn(self.ready[side], order, self.limit)]
        except SystemExit as error:
            self.failed[side] = {"error": in_short(error)}
            del self.ready[side]
            return []


def opened_together(rows: Sequence[Training], folder: Path, toy: bool, limit: float | None) -> list[Processes]:
    """The processes of some rows, when all of their sides have taken a turn or failed: ``limit`` as of Processes."""
    opened = [Processes(row, folder, toy, limit) for row in rows]
    sides = [(processes, side) for processes in opened for side in processes.commands]
    with ExitStack() as stack, ThreadPoolExecutor(len(sides)) as threads:
        for processes in opened:
            stack.enter_context(processes.stack)
        for begun in [threads.submit(processes.open, side) for processes, side in sides]:
            begun.result()
        stack.pop_all()
    return opened


def of_toy(settings: Sequence[str], toy: bool) -> list[str]:
    """Settings of a side; a toy has micro-batches of four clips."""
    if not toy:
        return list(settings)
    return [item if "micro_batch_size" not in item else "training.micro_batch_size=4" for item in settings]


def speed_of(turns: Sequence[dict[str, Any]]) -> float:
    """Clips a second of all turns together."""
    return float(sum(turn["clips"] for turn in turns) / sum(turn["seconds"] for turn in turns))


def figures_of(turns: list[dict[str, Any]], first: dict[str, Any]) -> dict[str, Any]:
    """A side's row: rates of all turns together, and what it has made for them or during them.

    Args:
        turns: those that count.
        first: before them, in which it compiled and captured.
    """
    found: dict[str, Any] = {"clips_per_second": round(speed_of(turns), 1)}
    last = turns[-1]
    if "mfu" in last:
        found |= {key: round(median(turn[key] for turn in turns), 3) for key in ("mfu", "product_tflops")}
    found |= {key: last[key] for key in ("micro_batch", "captured", "compile_seconds", "warning") if last.get(key)}
    made = sum(last[key] - first[key] for key in ("captured", "compiled") if key in last)
    if made:
        found["made_in_turns"] = made
    return found | {"first_turn_seconds": round(first["seconds"], 1)}


def profiled_figures(beside: list[dict[str, Any]], profile: list[dict[str, Any]]) -> dict[str, Any]:
    """What a profiled turn has shown; nothing where a side has failed in it.

    Args:
        beside: turns of the same batches without the profiler, which slows them.
        profile: the profiled one, or none.
    """
    found: dict[str, Any] = {}
    for turn in profile:
        found = {key: turn[key] for key in ("peak_gib", "planned_gib", "reserved_gib") if key in turn}
        if "busy_seconds" in turn and beside:
            found["busy"] = round(min(1.0, turn["busy_seconds"] / turn["clips"] * speed_of(beside)), 3)
            found |= {f"{name}_a_clip": round(turn[name] / turn["clips"], 1) for name in ("kernels", "launches")}
        elif "peak_gib" in turn:
            found["busy"] = "not seen by the profiler"
    return found
