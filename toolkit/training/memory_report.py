"""The memory that a run took beside the memory that its plan says: on the terminal, in its log and in its metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch

from toolkit.cluster.rendezvous import exchange
from toolkit.cpu.allocator import keeps_memory
from toolkit.errors import UserError
from toolkit.planning.afterwards import Computed, planned_cpu_phases, planned_phases
from toolkit.planning.hardware import CPU_LIBRARIES, GIB
from toolkit.training.monitoring.memory_phases import PHASES, Peaks, memory_figures
from toolkit.training.out_of_memory import computed, hardware_of
from toolkit.training.trainer import Trainer

log = logging.getLogger("toolkit")

# How far a plan may be off: the share, and the GiB below which no share says anything.
OFF = 0.15
SMALL = 0.1
LONG = 30.0  # seconds of steps; a plan for CPUs takes some, and a shorter run is a trial
# What a report of a wrong plan needs, of the run directory.
FILES = "recipe.yaml, deepspeed.json, environment.json, metrics.jsonl and log.txt"


def compare_memory(trainer: Trainer) -> Computed | None:
    """Compare the peaks of all ranks, which all call this; gives the heaviest micro-batches of any rank."""
    trainer.memory.compare(trainer.engine.device)
    shapes = exchange((trainer.memory.first, trainer.memory.later))
    found = computed(*(chain.from_iterable(of_ranks) for of_ranks in zip(*shapes, strict=True)))
    return found and replace(found, shapes=trainer.memory.named_shapes())


def report_memory(trainer: Trainer, heaviest: Computed | None, echo: Callable[[str], None]) -> None:
    """Report the peaks that were compared, on rank 0, beside the plan, which takes a second, or some on CPUs."""
    peaks = trainer.memory.of_ranks
    least, planned = _planned(trainer, heaviest) if heaviest else ({}, {})
    for line in lines(peaks, planned):
        log.info(line)
    echo(in_a_line(peaks, planned))
    trainer.tracker.log(trainer.progress.step, memory_figures(peaks, planned), kind="memory")
    if warning := wrong_plan(peaks, planned, least, str(trainer.resolved.run_dir)):
        trainer.warn(warning)


def _planned(trainer: Trainer, heaviest: Computed) -> tuple[dict[str, float], dict[str, float]]:
    """GiB by phase, at least and at most; nothing where the model cannot be planned: no run fails for its plan."""
    run = (trainer.resolved, trainer.corpus)
    rows = len(trainer.processor.tokenizer)
    try:
        if torch.cuda.is_available():
            most = least = planned_phases(*run, hardware_of(trainer.ranks), heaviest, rows)
        elif trainer.progress.seconds >= LONG:
            libraries = max(CPU_LIBRARIES, trainer.memory.libraries)
            least, most = planned_cpu_phases(*run, heaviest, rows, libraries=libraries, keeps=keeps_memory())
        else:
            return {}, {}
    except Exception as error:
        what = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.info("memory: no plan to compare with: %s", what)
        return {}, {}
    return _in_gib(least), _in_gib(most)


def _in_gib(sizes: dict[str, float]) -> dict[str, float]:
    return {phase: size / GIB for phase, size in sizes.items()}


def lines(peaks: Peaks, planned: dict[str, float]) -> list[str]:
    """A line for the log of each phase that was measured."""
    return [
        f"memory, {phase}: "
        + ", ".join(
            [
                *(f"{kind} {value:.3f} GiB" for kind, value in peaks[phase].items()),
                *([f"planned {planned[phase]:.3f} GiB"] if phase in planned else []),
            ]
        )
        for phase in PHASES
        if phase in peaks
    ]


def in_a_line(peaks: Peaks, planned: dict[str, float]) -> str:
    """The phases for the terminal."""
    parts = []
    for phase in PHASES:
        values = peaks.get(phase, {})
        if (measured := _measured(values)) is not None:
            plan = f" (planned {planned[phase]:.2f})" if phase in planned else ""
            parts.append(f"{phase} {measured:.2f}{plan}")
    return f"memory of the fullest rank, GiB: {', '.join(parts)}"


def _measured(values: dict[str, float]) -> float | None:
    """What a plan is for: of a GPU what torch allocated, else the process."""
    return values.get("allocated", values.get("process"))


def wrong_plan(peaks: Peaks, planned: dict[str, float], least: dict[str, float], run_dir: str) -> str | None:
    """A warning where a peak is more than 15 % above what was planned, or below the least of it; None where none is."""
    off = []
    for phase in PHASES:
        measured, plan = _measured(peaks.get(phase, {})), planned.get(phase)
        if measured is None or not plan:
            continue
        nearest = min(max(measured, least[phase]), plan)
        difference = measured - nearest
        if abs(difference) > max(OFF * nearest, SMALL):
            off.append(f"{phase} {measured:.2f} GiB, planned {nearest:.2f} ({difference / nearest:+.0%})")
    if not off:
        return None
    return (
        f"the plan of this run's memory is more than {OFF:.0%} off: {'; '.join(off)}. Please report it, with {FILES} "
        f"of {run_dir}"
    )
