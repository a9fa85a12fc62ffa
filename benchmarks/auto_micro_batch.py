#!/usr/bin/env python
"""How good the micro-batches are that `training.micro_batch_size: auto` chooses, and whether memory ever runs out.

python benchmarks/auto_micro_batch.py                what is missing in the results, two hours on two quiet cores
python benchmarks/auto_micro_batch.py --only demo    one sweep: every power of two beside what auto chooses
python benchmarks/auto_micro_batch.py --only random  random recipes and JSONs under random limits of addresses
python benchmarks/auto_micro_batch.py --again        measure all of them again

Each sweep takes turns: every micro-batch takes some steps in fresh processes, then all once more. Each row is written
to benchmarks/results/auto_micro_batch.json as it comes; a run that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from training_corpus import make_corpus

from toolkit.fitting.tuning import Cell, try_cell

RESULTS = ROOT / "benchmarks" / "results" / "auto_micro_batch.json"
RANKS, ROUNDS = 2, 2
CLIPS = 1024
SCRATCH = ("model.from_scratch=true", "model.tokenizer=train")
# T5-Base keeps two layers of its twelve: a step of 128 clips through all takes minutes here, and layers are alike.
# Steps of a turn are those of ten seconds or so, after one that does not count.
SWEEPS: dict[str, dict[str, Any]] = {
    "demo": {"recipe": "demo", "sizes": (1, 2, 4, 8, 16), "steps": 24, "overrides": ("data.source=table",)},
    "t5_small": {"recipe": "t5_small", "sizes": (1, 2, 4, 8, 16, 32, 64), "steps": 3, "overrides": SCRATCH},
    "t5_base": {
        "recipe": "t5_base",
        "sizes": (1, 2, 4, 8, 16, 32),
        "steps": 3,
        "overrides": (*SCRATCH, "training.global_batch_size=64"),
    },
}
CLOSE_ENOUGH = 0.95
JSONS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[*SWEEPS, "random"], metavar="NAME", help="of demo t5_small t5_base random"
    )
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="random runs (default 30)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="instead of all powers of two of a sweep")
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = Rows(arguments.results, again=arguments.again)
    with tempfile.TemporaryDirectory(prefix="auto-micro-batch-") as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"  # choices of an earlier measurement do not count
        corpus = make_corpus(Path(name) / "corpus", CLIPS).path
        for wanted in arguments.only or [*SWEEPS, "random"]:
            if wanted == "random":
                random_runs(rows, corpus, arguments.runs, Path(name))
            else:
                sweep(rows, wanted, corpus, arguments.sizes)
    print(f"wrote {rows.path}; draw the page: python benchmarks/page.py")


class Rows:
    """The results file: a figure for each sweep, its rows, and those of the random runs."""

    def __init__(self, path: Path, *, again: bool) -> None:
        self.path = path
        self.results: dict[str, Any] = (
            {} if again or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
        )

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


def sweep(rows: Rows, name: str, corpus: Path, sizes: list[int] | None) -> None:
    """Clips a second with each micro-batch, and with the one that is chosen."""
    recipe, steps = SWEEPS[name]["recipe"], SWEEPS[name]["steps"]
    overrides = [*SWEEPS[name]["overrides"], f"data.corpus={corpus}", "training.workers=0"]
    if name == "t5_base":
        overrides.append(f"model.backbone={shallow_backbone(corpus.parent)}")
    tried = [*(sizes or SWEEPS[name]["sizes"]), "auto"]

    def measure(size: int | str) -> dict[str, Any]:
        outcome = try_cell(ROOT / "launch" / "plan.py", recipe, overrides, Cell("zero1", size), RANKS, steps)
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
            rows.measured(f"sweep_{name}", key, lambda size=size: measure(size))
    found = rows.results[f"sweep_{name}"]
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


def shallow_backbone(folder: Path) -> Path:
    """The shape of T5-Base with two layers, as a configuration that random weights are made for."""
    from transformers import AutoConfig

    from toolkit.recipe.model_cards import load_model_yaml

    card, path = load_model_yaml("t5_base"), folder / "t5_base_of_two_layers"
    config = AutoConfig.for_model(card.architecture, **(card.config | {"num_layers": 2, "num_decoder_layers": 2}))
    config.save_pretrained(path)
    return path


def random_runs(rows: Rows, corpus: Path, runs: int, folder: Path) -> None:
    """Whole small runs of random recipes under random JSONs and limits: they end well, or say before step 1 why not."""
    for number in range(runs):
        rows.measured("random", {"run": number}, lambda number=number: random_run(number, corpus, folder))
    found = rows.results["random"]
    figure = {
        "ours_runs_out_of_memory": sum(row["end"] == "out of memory" for row in found),
        "runs": len(found),
        "trained": sum(row["end"] == "trained" for row in found),
        "refused_before_step_1": sum(row["end"] == "refused before step 1" for row in found),
        "other": sum(row["end"].startswith("other") for row in found),
        "target": "0",
    }
    rows.conclude("out_of_memory", figure)


def random_run(number: int, corpus: Path, folder: Path) -> dict[str, Any]:
    """One run of two steps, an evaluation and the scores, on one rank with so many GiB of addresses."""
    draw = random.Random(number)
    recipe, ds = draw.choice(("demo", "t5_small", "t5_small", "transformer")), draw.choice(JSONS)
    gib = round(draw.uniform(6.0, 14.0), 1)
    settings = [
        f"training.global_batch_size={draw.choice((4, 8, 16, 32))}",
        f"training.gradient_checkpointing={str(draw.random() < 0.3).lower()}",
        f"model.pose_encoder.stride={draw.choice((1, 2, 4))}",
        f"evaluation.num_beams={draw.choice((1, 2, 5))}",
        *(["model.lora.r=8"] if recipe == "t5_small" and draw.random() < 0.3 else []),
        *(["training.ema=0.99"] if draw.random() < 0.3 else []),
    ]
    fixed = [
        *SCRATCH[: 1 if recipe == "demo" else 2],
        "data.source=table", f"data.corpus={corpus}", f"run.dir={folder / f'run_{number}'}",
        "training.max_steps=2", "training.workers=0", "evaluation.max_new_tokens=16", "evaluation.samples=0",
    ]  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "--recipe",
        recipe,
        "--ds",
        ds,
        "--new",
        *settings,
        *fixed,
    ]
    limit = int(gib * GIB)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    output = f"{done.stdout}{done.stderr}"
    chosen = [line for line in done.stdout.splitlines() if line.startswith("micro-batches of")]
    return {
        "recipe": recipe,
        "ds": ds,
        "limit_gib": gib,
        "settings": " ".join(settings),
        "chosen": chosen[0].partition(":")[0] if chosen else "",
        "end": end_of(done.returncode, output, stepped=bool(chosen)),
    }


def end_of(code: int, output: str, *, stepped: bool) -> str:
    """How a run ended, in words."""
    if code == 0:
        return "trained"
    memory = any(
        word in output for word in ("allocate memory", "MemoryError", "OutOfMemory", "out of memory", "bad_alloc")
    )
    if not stepped:
        return "refused before step 1" if code == 2 else f"other, exit code {code}: {last_line(output)}"
    return "out of memory" if memory or code < 0 else f"other, exit code {code}: {last_line(output)}"


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:200]


if __name__ == "__main__":
    main()
