#!/usr/bin/env python
"""For how long a checkpoint blocks training: T5-Base with LoRA at its full size, two ranks.

python benchmarks/training_checkpoint.py     about 5 minutes on two cores

``measure()`` starts this file again under ``deepspeed``, as one rank of two. Each save is followed by a step, which the
thread that writes the copy may slow down; what that step takes beyond other steps counts as blocked, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from toolkit.cluster.ops import use_extensions_dir

use_extensions_dir()  # before anything imports DeepSpeed

RANKS = 2
SAVES = 15
TARGET_S = 0.5
SETTINGS = [
    "model.backbone=t5_base",
    "model.from_scratch=true",
    "model.tokenizer=bytes",
    "model.lora.r=16",
    "training.global_batch_size=2",  # short steps, so that a delay is visible
    "training.micro_batch_size=1",
    "training.workers=0",
    f"training.max_steps={2 * SAVES + 2}",
    "training.epochs=99",
    "data.source=demo",
]


def measure() -> dict[str, Any]:
    """Seconds for which a save blocks training, and until it is complete on the disk.

    Returns:
        ``checkpoint_block_s`` = ``call_s`` + (``next_step_s`` - ``step_s``), medians over the saves of the slower rank;
        ``complete_s`` (until the disk has it), ``megabytes`` of a checkpoint, ``trainable``, ``ranks``, ``target``.
    """
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*launcher, str(Path(__file__).resolve()), folder], env=environment, capture_output=True, text=True
        )
        results = Path(folder) / "results.json"
        if done.returncode or not results.is_file():
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return json.loads(results.read_text(encoding="utf-8"))


def one_rank(folder: Path) -> None:
    """Train and save by turns; rank 0 writes the result."""
    from torch import distributed as dist

    from toolkit.batching.loader import train_batches
    from toolkit.checkpointing import run_directory
    from toolkit.cluster.devices import barrier
    from toolkit.cluster.logs import log_to_file
    from toolkit.cluster.process_group import join_process_group, leave_process_group
    from toolkit.cluster.ranks import read_ranks
    from toolkit.corpus.packed import Corpus
    from toolkit.corpus.prepare import ensure_corpus
    from toolkit.recipe.resolve import resolve_named
    from toolkit.training.monitoring.interruptions import Interruptions
    from toolkit.training.run import open_trainer
    from toolkit.training.start import Start

    ranks = read_ranks()
    log_to_file(None)
    join_process_group(ranks)
    resolved = resolve_named("t5_small", [*SETTINGS, f"run.dir={folder / 'run'}"], ranks.world_size, has_gpu=False)
    corpus = Corpus.open(ensure_corpus(resolved.recipe.data))
    if ranks.is_main:
        run_directory.start(resolved, corpus)
    barrier()
    interruptions = Interruptions()
    times: dict[str, list[float]] = {"call": [], "next_step": [], "step": [], "complete": []}
    with open_trainer(resolved, ranks, corpus, Start(), interruptions, lambda _: None) as trainer:
        trainer.engine.train()
        batches = cycle(
            list(
                train_batches(
                    trainer.train_split,
                    trainer.processor.tokenizer,
                    resolved,
                    landmark_set=corpus.landmark_set,
                    epoch=0,
                    start_step=0,
                    rank=ranks.rank,
                )
            )[:1]  # the same clips, so that steps are equal
        )

        def step() -> float:
            barrier()
            started = time.perf_counter()
            trainer.step(next(batches))
            return time.perf_counter() - started

        step()
        trainer.save()  # the first one sets up threads and folders
        trainer.checkpoints.wait()
        for _ in range(SAVES):
            times["step"].append(step())
            barrier()
            started = time.perf_counter()
            trainer.save()
            times["call"].append(time.perf_counter() - started)
            times["next_step"].append(step())
            trainer.checkpoints.wait()
            times["complete"].append(time.perf_counter() - started)
        trainable = sum(p.numel() for p in trainer.engine.module.parameters() if p.requires_grad)
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, times)
    interruptions.close()
    if ranks.is_main:
        slowest = {key: [max(values) for values in zip(*(one[key] for one in everyone), strict=True)] for key in times}
        usual = median(slowest["step"])
        blocked = median(slowest["call"]) + max(0.0, median(slowest["next_step"]) - usual)
        size = sum(path.stat().st_size for path in (folder / "run" / "checkpoints").glob("step_*/*"))
        result = {
            "model": "t5_base, LoRA r=16",
            "ranks": ranks.world_size,
            "trainable": trainable,
            "megabytes": round(size / len(list((folder / "run" / "checkpoints").glob("step_*"))) / 1e6, 1),
            "checkpoint_block_s": round(blocked, 3),
            "call_s": round(median(slowest["call"]), 3),
            "next_step_s": round(median(slowest["next_step"]), 3),
            "step_s": round(usual, 3),
            "complete_s": round(median(slowest["complete"]), 3),
            "target": f"<= {TARGET_S}",
        }
        (folder / "results.json").write_text(json.dumps(result), encoding="utf-8")
    leave_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_rank(Path(sys.argv[-1]))
    else:
        print(json.dumps(measure(), indent=2))
