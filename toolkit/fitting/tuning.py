"""``launch/plan.py --tune``: the best cells of the plan's table, DeepSpeed JSON by micro-batch, tried on this machine.

Each cell is a fresh start of the real launcher on all ranks, with real collectives (:mod:`toolkit.fitting.trial`). One
that runs out of memory, or whose op does not build, leaves the others alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.cluster.cores import usable_cores
from toolkit.cluster.host_memory import free_host_memory
from toolkit.cluster.process_group import free_port
from toolkit.cluster.ranks import Ranks, check_ranks
from toolkit.corpus.mixture.opening import open_prepared
from toolkit.errors import UserError
from toolkit.fitting.deepspeed_json import compare_jsons
from toolkit.fitting.hardware import cards
from toolkit.fitting.trial import Speed, Trial
from toolkit.models.check import check_model
from toolkit.planning.comparison import Comparison, changes_results
from toolkit.planning.hardware import Hardware
from toolkit.planning.sizes.shapes import sizes
from toolkit.recipe.resolve import ResolvedRun, resolve_named

ON_CPUS = ("zero0", "zero1", "zero2")  # offloading on CPUs moves nothing, and stage 3 gathers what is there
CPU_SIZES = (8, 32)  # clips of a micro-batch: caches hold a few, and many share what a pass costs at least
JSONS, CELLS = 3, 6
ENDS_WITHIN = 10.0  # seconds that ranks have after SIGTERM

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """A DeepSpeed JSON and micro-batches.

    Attributes:
        deepspeed: its name.
        micro_batch_size: clips of a micro-batch, or ``auto``.
        micro_batch_frames: padded frames of one, at most; None = no limit.
        recomputes: whether activations are recomputed; None = as the recipe says.
    """

    deepspeed: str
    micro_batch_size: int | str
    micro_batch_frames: int | None = None
    recomputes: bool | None = None

    @property
    def settings(self) -> list[str]:
        """As the command line takes them."""
        recomputes = None if self.recomputes is None else str(self.recomputes).lower()
        given = {
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_frames": self.micro_batch_frames,
            "gradient_checkpointing": recomputes,
        }
        return [f"training.{key}={value}" for key, value in given.items() if value is not None]

    @property
    def clips(self) -> str:
        """Of a micro-batch, in words."""
        frames = f", {self.micro_batch_frames} frames" if self.micro_batch_frames else ""
        return f"{self.micro_batch_size}{frames}"


@dataclass(frozen=True)
class Outcome:
    """What a cell did.

    Attributes:
        cell: which one.
        speed: of its steps; None where it failed.
        problem: why it failed; empty where it did not.
        seconds: that it took with its start.
    """

    cell: Cell
    speed: Speed | None
    problem: str
    seconds: float


def cells_here(recipe: str, overrides: Sequence[str], ranks: int | None, only: str | None) -> tuple[int, list[Cell]]:
    """The ranks of this machine and the cells to try on them.

    Args:
        recipe, overrides: as on the command line; they name a corpus.
        ranks: how many; None = one on each GPU, else two, or the one core that there is.
        only: the DeepSpeed JSON that is tried alone; None = those that are worth it.

    Raises:
        UserError: the recipe, its corpus or its backbone is wrong, or no JSON goes with it here.
    """
    found = cards()
    world_size = ranks or len(found) or min(2, math.ceil(len(usable_cores().numbers)))
    check_ranks(Ranks(world_size=world_size, local_world_size=world_size), gpus=len(found), option="--ranks")
    own = resolve_named(recipe, overrides, world_size, has_gpu=bool(found), ds=only)
    open_prepared(own.recipe.data)  # what is wrong with all cells is an error at once
    check_model(own)
    if not found:
        return world_size, cells_on_cpus(recipe, overrides, world_size, own, only)
    hardware = Hardware(
        gpus=world_size,
        gpu_memory=min(card.free for card in found),
        host_memory=free_host_memory(),
    )
    comparison = compare_jsons(own.recipe, recipe, overrides, hardware, [only] if only else None)
    training = own.recipe.training
    given = None if training.micro_batch_size == "auto" else training.micro_batch_size
    chooses = training.gradient_checkpointing == "auto"
    cells = cells_by_plan(comparison, world_size, training.global_batch_size, given, chooses=chooses)
    if not cells:
        raise UserError(
            f"--tune: by the plan nothing fits on {hardware.in_words()}",
            f"python launch/plan.py --recipe {recipe} says what saves memory",
        )
    return world_size, cells


def cells_by_plan(
    comparison: Comparison, world_size: int, clips: int, given: int | None, *, chooses: bool = False
) -> list[Cell]:
    """On GPUs: the fastest JSONs of a plan, each with the micro-batches that a run would choose and the largest that
    fits, or with that and the next smaller one.

    Args:
        comparison: of the JSONs.
        world_size: ranks.
        clips: of a step.
        given: clips of a micro-batch that the recipe gives; None = they are chosen.
        chooses: whether it is chosen if activations are recomputed.
    """
    known = sorted((row for row in comparison.rows if row.seconds), key=lambda row: row.seconds or 0.0)
    rows = [row for row in known if not changes_results(row.config)] or known
    found = []
    for row in rows[: JSONS if given is None else CELLS]:
        recomputes = row.recomputes if chooses else None
        if given is not None:
            found += [Cell(row.name, given, None, recomputes)] if row.fits else []
            continue
        fitting = [size for size in sizes(-(-clips // world_size)) if size <= row.max_micro_batch]
        sized = [Cell(row.name, size, None, recomputes) for size in fitting]
        if row.choice:
            limits = row.choice.limits
            chosen = Cell(row.name, limits.clips, limits.frames, recomputes)
            sized = [chosen, *(cell for cell in sized if cell != chosen)]
        found += sized[:2]
    return found[:CELLS]


def cells_on_cpus(
    recipe: str, overrides: Sequence[str], world_size: int, own: ResolvedRun, only: str | None
) -> list[Cell]:
    """On CPUs, for which there is no plan: the recipe's own JSON and those that move little, with a few sizes."""
    names = [only] if only else list(dict.fromkeys([own.recipe.deepspeed, *ON_CPUS]))
    training = own.recipe.training
    share = -(-training.global_batch_size // world_size)
    given = training.micro_batch_size
    tried = sorted({min(size, share) for size in CPU_SIZES}) if given == "auto" else [min(given, share)]
    found = []
    for name in names:
        with contextlib.suppress(UserError):
            resolve_named(recipe, overrides, world_size, has_gpu=False, ds=name)
            found += [Cell(name, size) for size in tried]
    return found[:CELLS]


def tune(
    script: Path, recipe: str, overrides: Sequence[str], cells: Iterable[Cell], ranks: int, steps: int, echo: Echo
) -> list[Outcome]:
    """Try cells one after the other; Ctrl-C, SIGTERM and SIGHUP end this early, with what is there.

    Args:
        script: that is started on the ranks with ``--trial FILE``.
        recipe, overrides: as on the command line.
        cells: to try.
        ranks: on this machine.
        steps: of each cell.
        echo: prints a line.
    """
    outcomes: list[Outcome] = []
    todo = list(cells)
    for number, cell in enumerate(todo, start=1):
        echo(f"[{number}/{len(todo)}] {cell.deepspeed} with micro-batches of {cell.clips}: starting")
        try:
            with _signals_as_ctrl_c():
                outcome = try_cell(script, recipe, overrides, cell, ranks, steps)
        except KeyboardInterrupt:
            echo("interrupted: the cells that were not tried are left out")
            break
        outcomes.append(outcome)
        echo(f"[{number}/{len(todo)}] {_in_words(outcome)}")
    return outcomes


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Within it other requests to end do what Ctrl-C does: nothing else would end ranks in a group of their own."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def try_cell(script: Path, recipe: str, overrides: Sequence[str], cell: Cell, ranks: int, steps: int) -> Outcome:
    """Start one cell and wait for its end; arguments as for :func:`tune`."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tuning-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own = [
            *(word for word in overrides if not word.startswith(("run.dir=", *_replaced(cell)))),
            *cell.settings,
            "tracking.wandb=off",
            f"run.dir={folder / 'run'}",
        ]
        result, file, output = folder / "result.json", folder / "trial.json", folder / "output.txt"
        file.write_text(json.dumps(asdict(Trial(recipe, own, cell.deepspeed, steps, str(result)))), encoding="utf-8")
        command = [*_launcher(ranks), str(script), "--trial", str(file)]
        with output.open("wb") as out, _ended(command, out) as process:
            code = process.wait()
        speed = Speed(**json.loads(result.read_text(encoding="utf-8"))) if code == 0 and result.exists() else None
        problem = "" if speed else reason_of(output.read_text(encoding="utf-8", errors="replace"), code)
    return Outcome(cell, speed, problem, time.monotonic() - started)


def _launcher(ranks: int) -> list[str]:
    beside = Path(sys.executable).with_name("deepspeed")
    return [
        str(beside) if beside.exists() else "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
    ]


@contextlib.contextmanager
def _ended(command: list[str], out: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which has ended, with all that it started, when the context ends."""
    process = subprocess.Popen(
        command,
        stdout=out,
        stderr=out,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDS_WITHIN)


def reason_of(output: str, code: int) -> str:
    """Why a cell failed, in one line: the error that its ranks printed, else how they ended."""
    errors = re.findall(r"^error: (.+)", output, re.MULTILINE)
    if errors:
        return str(errors[0])
    raised = re.findall(r"^(?:\[rank\d+\]: )?(?:[\w.]+\.)?(\w*(?:Error|Exception)\b.*)", output, re.MULTILINE)
    return str(raised[-1]) if raised else f"its ranks ended with exit code {code}"


def fastest(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The outcome of the fastest cell; None where every one failed."""
    worked = [outcome for outcome in outcomes if outcome.speed]
    return max(worked, key=lambda outcome: outcome.speed.clips_per_second if outcome.speed else 0.0, default=None)


def command_of(outcome: Outcome, recipe: str, overrides: Sequence[str], ranks: int) -> str:
    """How to run the recipe with a cell."""
    cell = outcome.cell
    own = [shlex.quote(word) for word in overrides if not word.startswith(_replaced(cell))]
    words = [f"deepspeed --num_gpus {ranks} launch/train.py --recipe {recipe} --ds {cell.deepspeed}", *own]
    return " ".join([*words, *cell.settings])


def _replaced(cell: Cell) -> tuple[str, ...]:
    """What the overrides that a cell replaces begin with."""
    return tuple(f"{setting.partition('=')[0]}=" for setting in cell.settings)


def as_text(outcomes: Sequence[Outcome], recipe: str, overrides: Sequence[str], ranks: int) -> str:
    """The table, the fastest first, and its command."""
    lines = [f"{'DeepSpeed JSON':<24}{'micro-batch':>20}{'clips/s':>10}{'GiB a rank':>12}"]
    by_speed = sorted(outcomes, key=lambda one: -one.speed.clips_per_second if one.speed else 0.0)
    for outcome in by_speed:
        row = f"{outcome.cell.deepspeed:<24}{outcome.cell.clips:>20}"
        if outcome.speed:
            row += f"{outcome.speed.clips_per_second:>10.3g}{outcome.speed.peak_gib:>12.2f}"
        lines.append(row if outcome.speed else f"{row}  {outcome.problem}")
    best = fastest(outcomes)
    if best:
        lines += ["", f"fastest: {_in_words(best)}", f"  {command_of(best, recipe, overrides, ranks)}"]
    return "\n".join(lines)


def as_dict(outcomes: Sequence[Outcome], recipe: str, overrides: Sequence[str], ranks: int) -> dict[str, object]:
    """For ``--json``."""
    best = fastest(outcomes)
    rows = [
        asdict(outcome.cell)
        | {"clips_per_second": outcome.speed and outcome.speed.clips_per_second}
        | {"peak_gib": outcome.speed and outcome.speed.peak_gib, "problem": outcome.problem or None}
        for outcome in outcomes
    ]
    command = command_of(best, recipe, overrides, ranks) if best else None
    return {"ranks": ranks, "cells": rows, "fastest": best and asdict(best.cell), "command": command}


def _in_words(outcome: Outcome) -> str:
    what = f"{outcome.cell.deepspeed} with micro-batches of {outcome.cell.clips}"
    if outcome.speed is None:
        return f"{what} failed: {outcome.problem}"
    speed = outcome.speed
    return f"{what}: {speed.clips_per_second:.3g} clips/s, {speed.peak_gib:.2f} GiB a rank ({outcome.seconds:.0f} s)"
