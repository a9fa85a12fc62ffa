#!/usr/bin/env python
"""How long after a fault its reason is on the terminal, and until no process of the run is left.

python benchmarks/failures.py     about 5 minutes on two cores

The faults are those of tests/end_to_end/faults.py, injected into the last rank of two and of four. The peer is
torch's and DeepSpeed's way for the same error: a bare training script that leaves its process group in a ``finally``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import psutil

from tests.end_to_end.conftest import FOR_SPEED, environment, launcher
from tests.end_to_end.faults import TIMES, VARIABLE
from tests.end_to_end.warm_runs import Run, Warm, is_alive
from toolkit.corpus.demo import DemoSizes, make_demo

RESULTS = HERE / "results" / "failures.json"
FAULTS = ("step_1", "memory", "loader", "evaluation", "saving", "killed")
RANKS = (2, 4)
TURNS = 3
MESSAGE_S, GONE_S = 10, 30
POLL_S = 0.02
PATIENCE_S = 120.0
# Rank 1 fails before the second step; the others wait for it in the all-reduce of that step.
BARE = """
import sys, time, deepspeed, torch
deepspeed.init_distributed(verbose=False)
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 2}})
try:
    for step in range(9):
        if step == 1 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            open(sys.argv[-1], "w").write(str(time.time()))
            raise RuntimeError("injected")
        engine.backward(engine(torch.ones(1, 8)).sum())
        engine.step()
finally:
    torch.distributed.destroy_process_group()
"""


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = make_demo(folder / "clips", DemoSizes(train=24, dev=4, test=6, test_unseen_languages=3), seed=1)
        warm = Warm(folder, environment(), lambda script, *words, ranks: [*launcher(ranks), script, *map(str, words)])
        for ranks in RANKS:
            for fault in FAULTS:
                turns = []
                for turn in range(TURNS):
                    run_dir = folder / f"run_{ranks}_{fault}_{turn}"
                    variables = {VARIABLE: f"{fault} {ranks - 1}", TIMES: str(run_dir.with_suffix(".time"))}
                    run = warm.start(run_dir, arguments(clips, folder), ranks=ranks, **variables)
                    turns.append(seconds(run, run_dir.with_suffix(".time"), "error: "))
                    run.wait()
                rows.append(row(f"{fault}_{ranks}_ranks", turns))
                print(json.dumps(rows[-1]), flush=True)
        warm.process.communicate()
        bare = [bare_seconds(folder / f"bare_{turn}") for turn in range(TURNS)]
    result = {
        "message": {"ours_s": max(row["message_s"] for row in rows), "bare_s": middle(bare, 0), "target": MESSAGE_S},
        "all_gone": {"ours_s": max(row["gone_s"] for row in rows), "bare_s": middle(bare, 1), "target": GONE_S},
        "faults": rows,
        "machine": {"cores": os.cpu_count(), "turns": TURNS},
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(HERE.parent)}; python benchmarks/page.py draws it")


def arguments(clips: Path, folder: Path) -> list[str]:
    return [
        *("--recipe", "t5_small", "--ds", "zero2", *FOR_SPEED, "ds.data_types=null", "training.epochs=9"),
        *(f"data.table={clips / 'table.csv'}", f"data.poses={clips / 'poses'}", "data.source=table"),
        *(f"data.cache={folder / 'corpora'}", "training.save_every=2", "training.log_every=1"),
    ]


def seconds(run: Run, fault: Path, message: str) -> tuple[float, float]:
    """Seconds from the fault until its message is there, and until no process of the run is left."""
    processes: dict[int, psutil.Process] = {}
    shown = None
    deadline = time.time() + PATIENCE_S
    while time.time() < deadline:
        processes |= {process.pid: process for process in run.processes()}
        if shown is None and message in run.said():
            shown = time.time()
        if not any(map(is_alive, processes.values())):
            break
        time.sleep(POLL_S)
    else:
        raise SystemExit(f"still running after {PATIENCE_S:g} s:\n{run.said()}")
    if shown is None or not fault.is_file():
        raise SystemExit(f"no message, or no fault:\n{run.said()}")
    began = float(fault.read_text())
    return shown - began, time.time() - began


def bare_seconds(folder: Path) -> tuple[float, float]:
    """The same of the bare script, whose message is Python's traceback."""
    folder.mkdir()
    script, out, fault = folder / "bare.py", folder / "out.txt", folder / "time"
    script.write_text(BARE, encoding="utf-8")
    words = [*launcher(2), str(script), str(fault)]
    with out.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment())
    run = Run(psutil.Process(process.pid), folder, out, process.wait)
    try:
        return seconds(run, fault, "RuntimeError: injected")
    finally:  # ranks that the launcher ends leave DeepSpeed's shared memory behind
        port = words[words.index("--master_port") + 1]
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink()


def row(name: str, turns: list[tuple[float, float]]) -> dict[str, Any]:
    return {"fault": name, "message_s": middle(turns, 0), "gone_s": middle(turns, 1)}


def middle(turns: list[tuple[float, float]], which: int) -> float:
    return round(median(turn[which] for turn in turns), 2)


if __name__ == "__main__":
    main()
