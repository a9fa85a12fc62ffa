#!/usr/bin/env python
"""How near a plan comes to the memory that a run takes: predicted against measured peaks of two ranks on CPUs.

python benchmarks/planning.py                  cells chosen pairwise; those that have a row are kept
python benchmarks/planning.py --full           every cell
python benchmarks/planning.py --only t5_small/zero2/8/kept --again --tensors
python benchmarks/planning.py --predict        only predict again, from the measured rows as they are
python benchmarks/planning.py --plans          only what plans cost, seconds and memory of launch/plan.py over all
                                               JSONs: recipes without a row, with --again all of them

A cell is a model, a DeepSpeed JSON, a micro-batch, and whether activations are kept or recomputed. Measured is the
growth of a rank's resident set over what it held before it joined the process group: until the model is in its engine,
and in two steps of two micro-batches, of which the last alone has all its clips. Freed memory goes back to the system.
Every row is written into benchmarks/results/planning.json as it comes. T5-3B stands there as large_models.py has
measured it: the peak of the whole process in training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a rank has one core
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from planning_cells import MODELS, RANKS, STEPS, WORDS, Cell, all_cells, make_corpus, overrides_of, pairwise
from planning_side import GIB, import_all, run_ranks

from toolkit.cluster.environment import describe_environment
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cpu.linear import has_fast_bf16

RESULTS = ROOT / "benchmarks" / "results" / "planning.json"
PHASES = ("start", "step")
# Recipes whose plans over all JSONs are timed, and by figure the column of which the largest counts, and its limit.
PLANNED = ("t5_small", "t5_base", "t5_3b_lora", "t5_3b_qlora", "t5_3b", "qwen2_5_7b_lora")
COSTS = {"plan_of_a_recipe_time": ("seconds", 20), "plan_of_a_recipe_memory": ("gib", 2)}
COLORS = ("#2563a8", "#d97706", "#b91c1c", "#15803d", "#7c3aed")
PICTURE = ROOT / "docs" / "pictures" / "planning.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every cell")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cells, or the beginnings of their names")
    parser.add_argument("--again", action="store_true", help="measure cells that have a row again")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--tensors", action="store_true", help="print the tensors that were alive at the peaks (slow)")
    parser.add_argument("--plans", action="store_true", help="measure what plans cost, and nothing else")
    arguments = parser.parse_args()
    use_extensions_dir()
    if arguments.plans:
        plan_costs(again=arguments.again)
        return
    rows = {row["cell"]: row for row in read_rows()}
    every = all_cells()
    chosen = every if arguments.full else pairwise(every)
    if arguments.only:
        chosen = [cell for cell in every if cell.name.startswith(tuple(arguments.only))]
    if arguments.predict:
        chosen = [cell for cell in every if cell.name in rows]
    import_all()
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1, get_context("fork")) as predictor:
        folder = Path(name)
        make_corpus(folder / "corpus")
        for number, cell in enumerate(chosen, start=1):
            row = rows.get(cell.name)
            if row is None or arguments.again:
                try:
                    row = run(cell, folder, tensors=arguments.tensors)
                except RuntimeError as error:
                    print(f"{number} of {len(chosen)}: {cell.name} failed\n{error}", flush=True)
                    continue
            # In a process of its own: this one stays as small as it is when ranks are forked from it.
            row = rows[cell.name] = row | predictor.submit(predict, cell, folder, row).result()
            write_rows([rows[known.name] for known in every if known.name in rows])
            print(f"{number} of {len(chosen)}: {in_words(row)}", flush=True)
        write_rows(list(rows.values()), predictor.submit(predict_large).result())
    draw(read_rows())


def predict_large() -> list[dict[str, Any]]:
    """Plans of the runs of ``large_models.py`` beside the peaks that it has measured."""
    from large_models import CASES, FRAMES, RESULTS, STEPS, case_settings

    from toolkit.cpu import linear
    from toolkit.planning.cpu_plan import make_cpu_plan
    from toolkit.planning.subject import Subject
    from toolkit.planning.workload import Workload
    from toolkit.recipe.resolve import resolve_named

    measured = {row["name"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}
    rows = []
    for case in (case for case in CASES if case.name in measured):
        linear.has_fast_bf16 = lambda row=measured[case.name]: row.get("fast_bf16", False)
        resolved = resolve_named(
            case.recipe, case_settings(case), case.ranks, has_gpu=False, ds=case.ds, needs_data=False
        )
        shapes = tuple((1, FRAMES - step, WORDS) for step in range(STEPS))  # of a clip that augmentation changes
        workload = Workload(FRAMES, WORDS, FRAMES, ((1, 1),), None, "as measured", shapes)
        plan = make_cpu_plan(Subject.of(resolved.recipe, case.tokens), resolved, workload)
        predicted = max(plan.phases[phase] for phase in PHASES) / GIB
        peak = measured[case.name]["peak_gib_per_rank"]
        off = round(predicted / peak - 1, 3)
        rows.append({"run": case.name, "measured_gib": peak, "predicted_gib": round(predicted, 2), "off": off})
        print(f"{case.name}: {peak} GiB, {predicted:.2f} predicted, {off:+.1%} off", flush=True)
    return rows


def plan_costs(*, again: bool) -> None:
    """Measure what the command takes to plan recipes over all JSONs; each row is written as it comes."""
    found = {row["recipe"]: row for row in read_results().get("plans", []) if not again}
    for recipe in PLANNED:
        if recipe not in found:
            found[recipe] = plan_cost(recipe)
            print(found[recipe], flush=True)
            write_plans([found[name] for name in PLANNED if name in found])


def plan_cost(recipe: str) -> dict[str, Any]:
    """What the command takes, from its start to its end, in a process of its own.

    Raises:
        RuntimeError: it fails.
    """
    command = ["--recipe", recipe, "--gpus", "8", "--gpu-memory", "24GiB", "--json"]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "plan.py"), *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    with process.stdout as output:
        said = output.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"launch/plan.py --recipe {recipe} ended with exit code {process.returncode}")
    rows = json.loads(said)["jsons"]
    return {
        "recipe": recipe,
        "jsons": len(rows),
        "possible": sum(row["conflicts"] is None for row in rows),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "gib": round(usage.ru_maxrss / 2**20, 2),
    }


def run(cell: Cell, folder: Path, *, tensors: bool) -> dict[str, Any]:
    """Measure a cell."""
    out = Path(tempfile.mkdtemp(dir=folder))
    order = {
        "recipe": cell.spec.recipe,
        "ds": cell.ds,
        "overrides": [*overrides_of(cell, folder), f"run.dir={out / 'run'}"],
        "steps": STEPS,
        "tensors": tensors,
    }
    figures = run_ranks(order, RANKS, out)
    if tensors:
        for phase in ("start", "step"):
            print((out / f"{phase}_0.txt").read_text(encoding="utf-8"), flush=True)
    return {"cell": cell.name, "fast_bf16": has_fast_bf16()} | figures


@cache
def subject(model: str, folder: Path, rows: int, fast_bf16: bool) -> Any:
    """A model of ``MODELS`` with so many tokens; its traces are those of a processor with fast bf16 or without."""
    from toolkit.planning.subject import Subject
    from toolkit.recipe.load import load_recipe

    cell = Cell(model, "zero2", 1, recomputed=False)
    return Subject.of(load_recipe(cell.spec.recipe, overrides_of(cell, folder)), rows)


def predict(cell: Cell, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The plan's figures for a row, without the libraries of a process, and how far they are off.

    The plan is that of the processor on which the row was measured: where bf16 is slow, ranks multiply in fp32.
    """
    from toolkit.cpu import linear
    from toolkit.planning.cpu_plan import make_cpu_plan
    from toolkit.planning.hardware import CPU_LIBRARIES
    from toolkit.planning.workload import Workload
    from toolkit.recipe.resolve import resolve_named

    linear.has_fast_bf16 = lambda: row["fast_bf16"]  # this process predicts, and trains nothing
    overrides = overrides_of(cell, folder)
    resolved = resolve_named(cell.spec.recipe, overrides, RANKS, has_gpu=False, ds=cell.ds, needs_data=False)
    frames = row["frames"]
    shapes = tuple(tuple(shape) for shape in row["shapes"])
    workload = Workload(frames, row["tokens"], frames, ((1, 1),), None, "as measured", shapes)
    plan = make_cpu_plan(subject(cell.model, folder, row["rows"], row["fast_bf16"]), resolved, workload)
    start, step = ((plan.phases[phase] - CPU_LIBRARIES) / GIB for phase in ("start", "step"))
    return {
        "predicted_start_gib": round(start, 4),
        "predicted_step_gib": round(step, 4),
        "off": round(max(start, step) / peak_of(row) - 1, 3),
        "items": {name: round(size / GIB, 4) for name, size in plan.items.items() if name != "libraries"},
        "moment": plan.moment,
    }


def in_words(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    pairs = ", ".join(f"{phase} {row[f'{phase}_gib']:.3f} ({row[f'predicted_{phase}_gib']:.3f})" for phase in PHASES)
    return f"{row['cell']}: GiB, and predicted: {pairs}; the peak {row['off']:+.1%} off"


def draw(rows: list[dict[str, Any]]) -> None:
    """Predicted against measured peaks, a colour for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axis = figure.subplots()
    sizes = [size for row in rows for size in (peak_of(row), peak_of(row, "predicted_"))]
    ends = (0.8 * min(sizes), 1.25 * max(sizes))
    axis.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="#e4e8ee", label="±10 %")
    axis.plot(ends, ends, color="#8a94a3", linewidth=1)
    for model, color in zip(MODELS, COLORS, strict=True):
        own = [row for row in rows if row["cell"].split("/")[0] == model]
        if own:
            axis.scatter(
                [peak_of(row) for row in own], [peak_of(row, "predicted_") for row in own],
                s=16, color=color, label=model.replace("_", " "),
            )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter("{x:g}")
        each.set_minor_formatter("{x:.2g}")
        each.set_tick_params(which="both", labelsize=8)
    axis.set_xlabel("measured peak of a rank above its libraries, GiB")
    axis.set_ylabel("planned, GiB")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def peak_of(row: dict[str, Any], prefix: str = "") -> float:
    """The larger phase of a row, GiB."""
    return max(float(row[f"{prefix}{phase}_gib"]) for phase in PHASES)


def write_rows(rows: list[dict[str, Any]], large: list[dict[str, Any]] | None = None) -> None:
    """Write how near plans are, a row for each cell, and those of large models, as they are where none are given."""
    errors = {row["cell"]: abs(row["off"]) for row in rows if "off" in row}
    worst = max(errors, key=lambda cell: errors[cell])
    figures = {
        "cells_planned": len(errors),
        "within_10_percent": round(sum(error <= 0.1 for error in errors.values()) / len(errors), 3),
        "median_error": round(median(errors.values()), 3),
        "worst_error": errors[worst],
        "worst_cell": worst,
    }
    known = read_results()
    costs = {key: known[key] for key in (*COSTS, "plans") if key in known}
    found = {"machine": machine()} | figures | {"large_models": large or known.get("large_models", [])} | costs
    RESULTS.write_text(json.dumps(found | {"cells": rows}, indent=1) + "\n", encoding="utf-8")


def write_plans(rows: list[dict[str, Any]]) -> None:
    """Write what plans cost, a row for each recipe, beside the cells as they are."""
    known = read_results()
    cells = known.pop("cells", [])
    for key, (of, most) in COSTS.items():
        ours = {f"ours_{of}": max(row[of] for row in rows), "recipes": len(rows)}
        known[key] = ours | {"target": f"<= {most}", "machine": machine()}
    RESULTS.write_text(json.dumps(known | {"plans": rows, "cells": cells}, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    environment = describe_environment()
    return {key: environment[key] for key in ("cpu", "cores", "memory_gib")}


def read_rows() -> list[dict[str, Any]]:
    """The rows measured so far."""
    return read_results().get("cells", [])


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
