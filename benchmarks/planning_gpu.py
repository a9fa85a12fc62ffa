#!/usr/bin/env python
"""How near a plan comes to what torch's allocator holds on a GPU, phase by phase, measured without a GPU.

/path/to/python benchmarks/planning_gpu.py           a Python with a CUDA build of torch; cells that have a row are kept
/path/to/python benchmarks/planning_gpu.py --only t5_small/zero1 --again --history peak
python benchmarks/planning_gpu.py --predict          only predict again, from the measured rows as they are

The pretended CUDA runtime (tests/pretended_cuda) takes the place of GPUs: torch, its allocator, its choice of kernels,
DeepSpeed, Inductor and CUDA graphs are those of a GPU, and kernels compute nothing. A cell is a run of a recipe with
random weights of published size: three steps, an evaluation by beam search whose texts have their most tokens, one
more step, a model and a checkpoint that are saved. Its plan is the one that a run makes of itself, of the micro-batch
that it computed. Measured is what torch allocated on the fullest rank. ``--history`` has each rank write the
allocator's history beside this name, for https://pytorch.org/memory_viz. Every row is written into
benchmarks/results/planning_gpu.json as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from planning_gpu_cells import CELLS, STEPS, Cell, made_data, overrides_of

from tests.pretended_cuda.environment import find_environment
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.planning.afterwards import Computed, planned_phases
from toolkit.planning.hardware import GIB, Hardware
from toolkit.recipe.resolve import resolve_named

RESULTS = ROOT / "benchmarks" / "results" / "planning_gpu.json"
MEMORY = int(139.8 * GIB)  # of each GPU, as the runtime has it
PHASES = ("start", "step", "evaluation", "save")
LONGEST = 600  # seconds of a cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cells, or the beginnings of their names")
    parser.add_argument("--again", action="store_true", help="measure cells that have a row again")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--history", type=Path, metavar="FILE", help="where ranks write the allocator's history (slow)")
    arguments = parser.parse_args()
    known, rows = read_results(), read_rows()
    chosen = chosen_cells(arguments.only) if arguments.only else CELLS
    if not arguments.predict:
        try:
            known["torch"] = find_environment().torch
        except UserError as error:
            print(f"error: {error.lines}", file=sys.stderr)
            sys.exit(error.exit_code)
    with tempfile.TemporaryDirectory() as name:
        folder = made_data(Path(name))
        for number, cell in enumerate(chosen, start=1):
            if not arguments.predict and (cell.name not in rows or arguments.again):
                try:
                    rows[cell.name] = measure(cell, folder, arguments.history)
                except RuntimeError as error:
                    print(f"{number} of {len(chosen)}: {cell.name} failed\n{error}", flush=True)
                    continue
            rows = read_rows() | {name: rows[name] for name in (cell.name,) if name in rows}  # others may measure, too
            if cell.name in rows:
                row = rows[cell.name] = predicted(cell, folder, rows[cell.name])
                RESULTS.write_text(json.dumps(summary(known, rows), indent=1) + "\n", encoding="utf-8")
                print(f"{number} of {len(chosen)}: {in_words(row)}", flush=True)


def chosen_cells(names: Sequence[str]) -> list[Cell]:
    """Those of these names; a name that no cell has stands for all that begin with it."""
    known = {cell.name for cell in CELLS}
    begun = tuple(name for name in names if name not in known)
    return [cell for cell in CELLS if cell.name in names or (begun and cell.name.startswith(begun))]


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def read_rows() -> dict[str, dict[str, Any]]:
    """The rows measured so far, by cell."""
    return {row["cell"]: row for row in read_results().get("cells", [])}


def measure(cell: Cell, folder: Path, history: Path | None = None) -> dict[str, Any]:
    """Run a cell, a process for each rank.

    Raises:
        RuntimeError: a rank failed; the message holds what it printed.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    order = {
        "recipe": cell.recipe,
        "ds": cell.ds,
        "overrides": [*overrides_of(cell, folder), f"run.dir={own / 'run'}"],
        "steps": STEPS,
        "history": str(history.resolve()) if history else "",
    }
    (own / "order.json").write_text(json.dumps(order), encoding="utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    side = [sys.executable, str(ROOT / "benchmarks" / "planning_gpu_side.py"), str(own / "order.json")]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    shared = {
        "PRETENDED_CUDA_NUMBERS": "0", "PRETENDED_CUDA_GPUS": str(cell.ranks), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(cell.ranks), "LOCAL_SIZE": str(cell.ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "PYTHONPATH": paths,
    }  # fmt: skip
    ranks = []
    for rank in range(cell.ranks):
        with (own / f"rank_{rank}.txt").open("wb") as output:
            command = [sys.executable, "-m", "tests.pretended_cuda", *side, str(own / "row.json")]
            own_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=os.environ | shared | own_rank)
            )
    codes = [ended(process) for process in ranks]
    if any(codes):
        texts = [(own / f"rank_{rank}.txt").read_text(encoding="utf-8", errors="replace") for rank in range(cell.ranks)]
        raise RuntimeError("\n".join(text[-1500:] for text in texts))
    return {"cell": cell.name, **json.loads((own / "row.json").read_text(encoding="utf-8"))}


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a rank, which is killed where it takes too long."""
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def predicted(cell: Cell, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the plan that its run makes of itself, and how far each phase is off."""
    overrides = overrides_of(cell, folder)
    resolved = resolve_named(cell.recipe, overrides, cell.ranks, has_gpu=True, ds=cell.ds)
    computed = Computed.from_dict(row["computed"])
    corpus = Corpus.open(folder / "corpus")
    phases = planned_phases(resolved, corpus, Hardware(cell.ranks, MEMORY), computed, row["rows"])
    figures: dict[str, float] = {}
    for phase in PHASES:
        peak, planned = row["peaks"][phase]["allocated"], phases[phase] / GIB
        figures |= {f"{phase}_gib": round(peak, 3), f"planned_{phase}_gib": round(planned, 3)}
        figures[f"{phase}_off"] = round(planned / peak - 1, 3) + 0.0  # no -0.0
    most = max(figures[f"{phase}_gib"] for phase in PHASES)
    figures["off"] = round(max(figures[f"planned_{phase}_gib"] for phase in PHASES) / most - 1, 3)
    return {"cell": cell.name} | figures | {key: row[key] for key in ("peaks", "computed", "rows")}


def summary(known: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the file says: how near plans are, and the rows in the order of the cells."""
    ordered = [rows[cell.name] for cell in CELLS if cell.name in rows]
    off, steps = ([row[key] for row in ordered] for key in ("off", "step_off"))
    return {
        "torch": known.get("torch"),
        "cells_planned": len(ordered),
        "within_10_percent": sum(abs(error) <= 0.1 for error in off),
        "steps_within_10_percent": sum(abs(error) <= 0.1 for error in steps),
        "median_error": round(median(map(abs, off)), 3),
        "most_above": max(off),
        "most_below": min(off),
        "cells": ordered,
    }


def in_words(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    pairs = (f"{phase} {row[f'{phase}_gib']:.3f} ({row[f'planned_{phase}_gib']:.3f})" for phase in PHASES)
    return f"{row['cell']}: GiB, and planned: {', '.join(pairs)}; the largest {row['off']:+.1%} off"


if __name__ == "__main__":
    main()
