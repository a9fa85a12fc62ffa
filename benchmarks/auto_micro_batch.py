#!/usr/bin/env python
"""How good the micro-batches are that `training.micro_batch_size: auto` chooses, and whether memory ever runs out.

python benchmarks/auto_micro_batch.py                      what is missing in the results, two hours on two quiet cores
python benchmarks/auto_micro_batch.py --only sweep_demo    one sweep: every power of two beside what auto chooses
python benchmarks/auto_micro_batch.py --only cost_demo     what its rehearsal costs: first starts, and the next ones
python benchmarks/auto_micro_batch.py --only random        random models and JSONs under limits of memory that bind
python benchmarks/auto_micro_batch.py --again              measure all of them again, or those of --only

Each sweep takes turns: every micro-batch takes some steps in fresh processes, then all once more. Each row is written
to benchmarks/results/auto_micro_batch.json as it comes; a run that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from limited_runs import random_runs
from planning_cells import Model, shallow_backbone
from training_corpus import make_corpus

from toolkit.cluster.ops import use_extensions_dir
from toolkit.fitting.tuning import Cell, Outcome, try_cell
from toolkit.recipe.load import load_recipe

RESULTS = ROOT / "benchmarks" / "results" / "auto_micro_batch.json"
RANKS, ROUNDS = 2, 2
CLIPS = 1024
SCRATCH = ("model.from_scratch=true", "model.tokenizer=train")
# T5-Base keeps two layers of its twelve: a step of 128 clips through all takes minutes here, and layers are alike.
# Steps of a turn are those of an epoch, since each has clips of other lengths, after one that does not count.
SWEEPS: dict[str, dict[str, Any]] = {
    "demo": {"recipe": "demo", "sizes": (1, 2, 4, 8, 16), "steps": 33, "overrides": ("data.source=table",)},
    "t5_small": {"recipe": "t5_small", "sizes": (4, 8, 16, 32, 64), "steps": 9, "overrides": SCRATCH},
    "t5_base": {
        "recipe": "t5_base",
        "sizes": (4, 8, 16, 32),
        "steps": 17,
        "overrides": (*SCRATCH, "training.global_batch_size=64"),
    },
}
SWEPT, COSTS = ({f"{table}_{name}": name for name in SWEEPS} for table in ("sweep", "cost"))
ALL = [*SWEPT, *COSTS, "random"]
CLOSE_ENOUGH = 0.95
COST_ROUNDS, COST_STEPS = 3, 3  # pairs of whole starts; most steps that a rehearsal may cost
MOST_STEPS_AFTER = {"t5_base": 5}  # of its twelve layers, ten seconds each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="NAME", help=f"of {' '.join(ALL)}")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="random runs (default 30)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="instead of all powers of two of a sweep")
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = Rows(arguments.results)
    chosen = arguments.only or ALL
    for table in chosen if arguments.again else ():
        rows.forget(table)
    use_extensions_dir()
    with tempfile.TemporaryDirectory(prefix="auto-micro-batch-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"  # choices of an earlier measurement do not count
        if any(table != "random" for table in chosen):
            corpus = make_corpus(folder / "corpus", CLIPS).path
        for table in chosen:
            if table == "random":
                random_runs(rows, arguments.runs, folder)
            elif table in COSTS:
                cost(rows, table, corpus, folder)
            else:
                sweep(rows, table, corpus, arguments.sizes)
    print(f"wrote {rows.path}; draw the page: python benchmarks/page.py")


def cost(rows: Rows, table: str, corpus: Path, folder: Path) -> None:
    """What the first start of a recipe takes longer than the next one, which keeps its choice, in steps of the run."""
    name = COSTS[table]
    # With the recipe's own batch and all layers, whose steps are not repeated here.
    overrides = [f"data.corpus={corpus}", "training.workers=0", *(() if name == "demo" else SCRATCH)]

    def pair() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as cache:  # without the choice of an earlier start
            os.environ["XDG_CACHE_HOME"] = cache
            steps = MOST_STEPS_AFTER.get(name, SWEEPS[name]["steps"])
            first, following = (trial(name, overrides, "auto", steps) for _ in range(2))
        if first.speed is None or following.speed is None:
            raise SystemExit(f"error: {name} did not train: {first.problem or following.problem}")
        rates = (first.speed.clips_per_second, following.speed.clips_per_second)
        return {
            "first_seconds": round(first.seconds, 2),
            "next_seconds": round(following.seconds, 2),
            "clips_per_second": round(median(rates), 2),
            "batch": following.speed.batch,
        }

    for number in range(COST_ROUNDS):
        rows.measured(table, {"round": number}, pair)
    found = rows.results[table]
    seconds = median(row["first_seconds"] - row["next_seconds"] for row in found)
    clips = load_recipe(SWEEPS[name]["recipe"], overrides).training.global_batch_size
    step = clips / median(row["clips_per_second"] for row in found)
    figure = {
        "ours_steps": round(seconds / step, 1),
        "seconds": round(seconds, 2),
        "seconds_of_a_step": round(step, 3),
        "target": f"<= {COST_STEPS}",
    }
    rows.conclude(f"rehearsal_{table}", figure)


def trial(name: str, overrides: list[str], size: int | str, steps: int) -> Outcome:
    """Some steps of a recipe in fresh processes."""
    cell = Cell("zero1", size)
    return try_cell(ROOT / "launch" / "plan.py", SWEEPS[name]["recipe"], overrides, cell, RANKS, steps)


class Rows:
    """The results file: a figure for each sweep, its rows, and those of the random runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def forget(self, table: str) -> None:
        """Measure a table's rows again; its figure stays until then."""
        self.results.pop(table, None)

    def measured(self, table: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with this key, measured and written where it is missing."""
        rows: list[dict[str, Any]] = self.results.setdefault(table, [])
        found = next((row for row in rows if key.items() <= row.items()), None)
        if found is None:
            found = key | measure()
            print(json.dumps(found), flush=True)
            rows.append(found)
            self.write()
        return found

    def conclude(self, key: str, figure: dict[str, Any]) -> None:
        """Write the figure of a table."""
        machine = {"cores": os.cpu_count(), "processor": platform.machine()}
        self.results[key] = figure | {"machine": machine}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")


def sweep(rows: Rows, table: str, corpus: Path, sizes: list[int] | None) -> None:
    """Clips a second with each micro-batch, and with the one that is chosen."""
    name = SWEPT[table]
    overrides = [*SWEEPS[name]["overrides"], f"data.corpus={corpus}", "training.workers=0"]
    if name == "t5_base":
        overrides += shallow_backbone(Model("t5_base", 2), corpus.parent)
    tried = [*(sizes or SWEEPS[name]["sizes"]), "auto"]

    def measure(size: int | str) -> dict[str, Any]:
        outcome = trial(name, overrides, size, SWEEPS[name]["steps"])
        if outcome.speed is None:
            return {"clips_per_second": 0.0, "problem": outcome.problem}
        speed = outcome.speed
        return {
            "clips_per_second": round(speed.clips_per_second, 2),
            "gib_a_rank": round(speed.peak_gib, 2),
            "batch": speed.batch,
            "seconds": round(outcome.seconds),
        }

    for number in range(ROUNDS):
        for size in tried:
            key = {"micro_batch_size": size, "round": number}
            rows.measured(table, key, lambda size=size: measure(size))
    found = rows.results[table]
    rates = {
        size: median(row["clips_per_second"] for row in found if row["micro_batch_size"] == size) for size in tried
    }
    best = max((size for size in tried if size != "auto"), key=lambda size: rates[size])
    figure = {
        "ours_clips_per_second": rates["auto"],
        "peer_clips_per_second": rates[best],
        "ratio": round(rates["auto"] / rates[best], 3),
        "best_by_hand": best,
        "target": f">= {CLOSE_ENOUGH}",
    }
    rows.conclude(f"auto_vs_best_{name}", figure)


if __name__ == "__main__":
    main()
