"""Figures of a turn of our own side: utilisation, padding, the plan of its steps, and what was made for them."""

from __future__ import annotations

import json
import re

from toolkit.batching.collate import Batch
from toolkit.training.memory_report import compare_memory, report_memory
from toolkit.training.monitoring.flops import measure_peak
from toolkit.training.monitoring.metering import product_type
from toolkit.training.trainer import Trainer


def utilisation(trainer: Trainer, batches: list[Batch], seconds: float) -> dict[str, float]:
    """``mfu``, model-FLOPs utilisation of a turn, against the ``product_tflops`` of a matrix product right after it."""
    assert trainer.meter.cost
    flops = sum(map(trainer.meter.cost.of, batches))
    peak = measure_peak(trainer.engine.device, product_type(trainer.resolved))
    return {"mfu": flops / seconds / peak, "product_tflops": peak / 1e12}


def padded_frames(batches: list[Batch]) -> float:
    """Frames of batches, padding included, by those of their clips."""
    return sum(batch.frame_mask.numel() for batch in batches) / sum(batch.num_frames for batch in batches)


def planned_step(trainer: Trainer) -> dict[str, float]:
    """``peak_gib`` of the steps that were taken and, where they have a plan, ``planned_gib``, as a run reports them.

    What measures the GPU's speed between them is in neither.
    """
    report_memory(trainer, compare_memory(trainer), lambda _: None)
    metrics = (trainer.resolved.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (memory,) = [row for row in map(json.loads, metrics) if row["kind"] == "memory"][-1:]
    names = {"peak_gib": "step_allocated_gib", "planned_gib": "step_planned_gib"}
    return {name: round(memory[key], 2) for name, key in names.items() if key in memory}


def made_so_far(trainer: Trainer) -> dict[str, int | float | str]:
    """What the run's log says of the process so far: ``compiled`` graphs of layers, in ``compile_seconds``, and
    ``captured`` passes; and the last ``warning`` that layers or passes run without, if there is one."""
    return made_by((trainer.resolved.run_dir / "log.txt").read_text(encoding="utf-8"))


def made_by(log: str) -> dict[str, int | float | str]:
    """As :func:`made_so_far`, of the text of a log."""
    seconds = [float(found) for found in re.findall(r"compiling a layer took ([\d.]+) s", log)]
    warnings = re.findall(r"toolkit WARNING (.* run without .+)", log)
    return {
        "compiled": len(seconds),
        "compile_seconds": round(sum(seconds), 1),
        "captured": log.count("a CUDA graph: "),
        **({"warning": warnings[-1]} if warnings else {}),
    }
