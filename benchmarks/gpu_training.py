"""Ways of training that take turns on one machine, for ``gpu.py``: each is a process that builds its model once."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sides import started, take_turn

HERE = Path(__file__).resolve().parent
ROUNDS = 3
TRAINED = 2048  # clips of an epoch
LONGEST = 5.0  # seconds after which a side takes no further turn
PROFILED = 32  # steps, at most
TOY = ["model.tiny=true", "training.workers=0", "model.pose_encoder.hidden=32", "ds.bf16.enabled=false"]


class Training(NamedTuple):
    """Clips a second of a recipe by several ways of training.

    Attributes:
        recipe: in recipes/.
        clips: of a global batch.
        sides: name in the results -> way of ``training_side.py``, and its settings.
        alone: no other row fits beside it.
    """

    recipe: str
    clips: int
    sides: dict[str, tuple[str, ...]]
    alone: bool = False

    def commands(self, folder: Path, toy: bool) -> dict[str, list[str]]:
        """The command of each side."""
        settings = [
            f"model.tokenizer={folder / 'tokenizer'}",
            "model.from_scratch=true",
            f"training.global_batch_size={self.clips_of(toy)}",
            *(TOY if toy else []),
            *("--recipe", self.recipe),
        ]
        script = str(HERE / "training_side.py")
        return {
            side: [script, way, str(folder), *of_toy(more, toy), *settings] for side, (way, *more) in self.sides.items()
        }

    def clips_of(self, toy: bool) -> int:
        return 8 if toy else self.clips

    def steps(self, side: str, toy: bool) -> int:
        """Of a turn: a whole epoch, whose batches are sorted by length; of Seq2SeqTrainer, whose are not, a part."""
        epoch = 2 if toy else TRAINED // self.clips
        return max(2, epoch // 4) if self.sides[side][0] == "hf" else epoch

    def measure(self, processes: Processes, toy: bool) -> dict[str, Any]:
        """Turns of all sides, one at a time."""
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in self.sides if side in processes.ready}
        for _ in range(1 if toy else ROUNDS):
            for side in [side for side in turns if side in processes.ready]:
                if sum(turn["seconds"] for turn in turns[side]) < LONGEST:
                    turns[side] += processes.turn(side, self.steps(side, toy))
        found: dict[str, dict[str, Any]] = {}
        for side in [side for side in turns if side in processes.ready]:
            for profile in processes.turn(side, f"profile {min(self.steps(side, toy), PROFILED)}"):
                found[side] = figures_of(turns[side], profile)
                found[side]["first_turn_seconds"] = round(processes.first[side]["seconds"], 1)
        return {"clips_a_step": self.clips_of(toy), "sides": found | processes.failed}


class Processes:
    """Those of one row, which build their models, compile, capture and warm up at the same time as those of others.

    Attributes:
        ready: name of a side -> its process.
        first: its first turn, which is no measure.
        failed: of those that have ended, why.
    """

    def __init__(self, row: Training, folder: Path, toy: bool) -> None:
        self.row, self.toy = row, toy
        self.ready: dict[str, subprocess.Popen[str]] = {}
        self.first: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.commands = row.commands(folder, toy)
        self.stack = ExitStack()

    def open(self, side: str) -> None:
        """Start one side, and let it take its first turn."""
        try:
            self.ready[side] = self.stack.enter_context(started(self.commands[side]))
            self.first[side] = next(iter(self.turn(side, self.row.steps(side, self.toy))), {})
        except SystemExit as error:
            self.failed[side] = {"error": str(error)[-500:]}

    def turn(self, side: str, order: int | str) -> list[dict[str, Any]]:
        """What a side answers; nothing, where it fails, and from then on it is not ready."""
        try:
            return [take_turn(self.ready[side], order)]
        except (SystemExit, BrokenPipeError) as error:
            self.failed[side] = {"error": str(error)[-500:]}
            del self.ready[side]
            return []


def opened_together(rows: Sequence[Training], folder: Path, toy: bool) -> list[Processes]:
    """The processes of some rows, when all of their sides have taken a turn or failed."""
    opened = [Processes(row, folder, toy) for row in rows]
    sides = [(processes, side) for processes in opened for side in processes.commands]
    with ThreadPoolExecutor(len(sides)) as threads:
        for begun in [threads.submit(processes.open, side) for processes, side in sides]:
            begun.result()
    return opened


def of_toy(settings: Sequence[str], toy: bool) -> list[str]:
    """Settings of a side; a toy has micro-batches of four clips."""
    if not toy:
        return list(settings)
    return [item if "micro_batch_size" not in item else "training.micro_batch_size=4" for item in settings]


def figures_of(turns: list[dict[str, Any]], profile: dict[str, Any]) -> dict[str, Any]:
    """A side's row: rates of all turns together, and what a profiled one has shown."""
    speed = sum(turn["clips"] for turn in turns) / sum(turn["seconds"] for turn in turns)
    found = {"clips_per_second": round(speed, 1)}
    if "mfu" in turns[0]:
        found["mfu"] = round(median(turn["mfu"] for turn in turns), 3)
    if "busy_seconds" in profile:
        # Of a clip that is not profiled, which has the same kernels and takes less time.
        found["busy"] = round(min(1.0, profile["busy_seconds"] / profile["clips"] * speed), 3)
        found["launches_a_clip"] = round(profile["launches"] / profile["clips"], 1)
        found |= {key: profile[key] for key in ("peak_gib", "planned_gib") if key in profile}
    return found
