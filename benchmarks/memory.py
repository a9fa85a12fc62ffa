#!/usr/bin/env python
"""What each DeepSpeed JSON needs: peak memory of a rank and seconds a step, the same model under all of them.

python benchmarks/memory.py                        full-size T5-Base on two ranks, about ten minutes on two cores
python benchmarks/memory.py --only zero0 zero3     some of them; the others keep their figures

Every JSON gets two fresh processes. Writes benchmarks/results/memory.json and the table in ds_configs/README.md. What
needs a GPU is left out on a CPU, and what needs a missing op.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.cluster.environment import describe_environment
from toolkit.cluster.ops import is_built, use_extensions_dir
from toolkit.recipe.deepspeed.json_file import ds_config_names

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
README = ROOT / "ds_configs" / "README.md"
BEGIN, END = "<!-- measured: python benchmarks/memory.py -->", "<!-- /measured -->"
BACKBONE, RANKS, STEPS = "t5_base", 2, 3
SETTINGS = [
    f"model.backbone={BACKBONE}",
    "model.from_scratch=true",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.workers=0",
    f"training.max_steps={STEPS}",
    "training.epochs=1",
]
# What only a GPU host can run; tests/recipe holds the list to what the resolver refuses.
GPU_HOSTS = ("zero2_fp16", "zero3_plus_plus")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ds_config_names(), help="DeepSpeed JSONs")
    parser.add_argument("--table", action="store_true", help="only write the table again, from the results as they are")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_extensions_dir()
    if arguments.worker:
        measure(arguments.worker, arguments.out)
        return
    if not arguments.table:
        names = arguments.only or [name for name in ds_config_names() if name not in GPU_HOSTS]
        rows = {row["ds"]: row for row in read_results()} if arguments.only else {}
        for name in names:
            if name.endswith("nvme") and not is_built("async_io"):
                print(f"{name}: left out, op async_io is not built")
                continue
            rows[name] = run_one(name)
            print(json.dumps(rows[name]), flush=True)
        machine = {key: describe_environment()[key] for key in ("cpu", "cores", "memory_gib")}
        ordered = [rows[name] for name in ds_config_names() if name in rows]
        RESULTS.write_text(json.dumps({"machine": machine, "memory": ordered}, indent=2) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), read_results()), encoding="utf-8")


def read_results() -> list[dict[str, Any]]:
    """The rows measured so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["memory"] if RESULTS.exists() else []


def with_table(text: str, rows: list[dict[str, Any]]) -> str:
    """ds_configs/README.md with the table between its two marks written again."""
    lines = [
        BEGIN,
        "| name | peak memory a rank, training | the same, starting up | seconds a step |",
        "|---|---|---|---|",
        *(
            f"| `{row['ds']}` | {row['peak_gib']:.1f} GiB | {row['start_gib']:.1f} GiB "
            f"| {row['seconds_per_step']:.1f} |"
            for row in rows
        ),
        END,
    ]
    head, _, rest = text.partition(BEGIN)
    return head + "\n".join(lines) + rest.partition(END)[2]


def run_one(name: str) -> dict[str, Any]:
    """Start the ranks of one JSON and gather what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as listener:  # a run beside this one may hold DeepSpeed's usual port
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus",
            str(RANKS),
            "--master_port",
            str(port),
        ]
        worker = [str(Path(__file__).resolve()), "--worker", name, "--out", folder]
        done = subprocess.run(
            [*launcher, *worker], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]
    assert len(ranks) == RANKS
    return {
        "ds": name,
        "model": BACKBONE,
        "ranks": RANKS,
        "peak_gib": round(max(rank["peak_gib"] for rank in ranks), 2),
        "start_gib": round(max(rank["start_gib"] for rank in ranks), 2),
        "imports_gib": round(max(rank["imports_gib"] for rank in ranks), 2),
        "seconds_per_step": round(max(rank["seconds_per_step"] for rank in ranks), 2),
    }


def measure(name: str, out: Path) -> None:
    """One rank: build, train some steps, write down what it took."""
    from toolkit.batching.loader import train_batches
    from toolkit.cluster.ranks import read_ranks
    from toolkit.corpus.packed import Corpus
    from toolkit.corpus.prepare import ensure_corpus
    from toolkit.cpu.allocator import keep_freed_memory, return_freed_memory
    from toolkit.recipe.load import load_recipe
    from toolkit.recipe.resolve import resolve_named
    from toolkit.training.run import open_run, open_trainer
    from toolkit.training.start import Start

    ranks = read_ranks()
    corpus = Corpus.open(ensure_corpus(load_recipe("demo").data, is_local_main=ranks.is_local_main))
    overrides = [*SETTINGS, f"data.corpus={corpus.path}", f"run.dir={out / 'run'}"]
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=False, ds=name)
    return_freed_memory() if resolved.zero_stage == 3 else keep_freed_memory()  # as launch/train.py does
    imports = memory_gib("VmRSS")
    with (
        open_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, Start(), interruptions, lambda _: None) as trainer,
    ):
        start = memory_gib("VmHWM")
        trainer.engine.train()
        batches = train_batches(
            trainer.train_split,
            trainer.processor.tokenizer,
            resolved,
            landmark_set=corpus.landmark_set,
            epoch=0,
            start_step=0,
            rank=ranks.rank,
        )
        seconds = []
        for number, batch in enumerate(batches):
            if number == STEPS:
                break
            if number == 1:  # the first step makes the optimizer's states; the peak of start-up is over
                Path("/proc/self/clear_refs").write_text("5")
            began = time.monotonic()
            trainer.step(batch)
            seconds.append(time.monotonic() - began)
        peak = memory_gib("VmHWM")
        trainer.engine.destroy()
    figures = {
        "imports_gib": imports,
        "start_gib": start,
        "peak_gib": peak,
        "seconds_per_step": sum(seconds[1:]) / len(seconds[1:]),
    }
    (out / f"rank_{ranks.rank}.json").write_text(json.dumps(figures))


def memory_gib(line: str) -> float:
    """Resident memory of this process: now (``VmRSS``) or at most since the mark was last set back (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return int(next(row for row in status.splitlines() if row.startswith(line)).split()[1]) / 2**20


if __name__ == "__main__":
    main()
