"""One rank of test_final_scores.py: whole trainings, one after the other, and the memory that each part of them takes.

Starting two ranks costs more than training a small model for some steps, so one start serves all cases.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from toolkit.checkpointing import run_directory
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import Ranks, read_ranks
from toolkit.corpus.packed import Corpus
from toolkit.cpu.allocator import return_freed_memory
from toolkit.decoding.decode_split import translate_split
from toolkit.models.loading.load import load_translator
from toolkit.planning import memory
from toolkit.recipe.resolve import resolve_named
from toolkit.scoring.predictions import write_predictions
from toolkit.training import run as training_run
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.start import Start, find_start
from toolkit.training.trainer import Trainer


def main() -> None:
    use_extensions_dir()
    return_freed_memory()  # so that what a rank holds is what it takes
    plan = json.loads(Path(sys.argv[-1]).read_text())
    ranks = read_ranks()
    log_to_file(None)
    join_process_group(ranks)
    training_run.open_run = in_this_group
    results = {
        name: train(case, plan["settings"], Path(plan["folder"]) / name, ranks) for name, case in plan["cases"].items()
    }
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, results)
    if ranks.is_main:
        Path(plan["results"]).write_text(json.dumps(everyone))
    leave_process_group()


@contextmanager
def in_this_group(resolved: Any, ranks: Ranks, corpus: Corpus) -> Iterator[Interruptions]:
    """A run among others of the same process group."""
    if ranks.is_main:
        run_directory.start(resolved, corpus.path)
    dist.barrier()
    interruptions = Interruptions()
    try:
        yield interruptions
    finally:
        interruptions.close()


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Peak bytes while steps were taken and while the best model was scored, above what was there before the run."""
    overrides = [*settings, *case["overrides"], f"run.dir={run_dir}"]
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=False, ds=case["ds"])
    corpus = Corpus.open(resolved.recipe.data.corpus or "")
    peaks: dict[str, int] = {}
    evaluate, score_best, free_memory = Trainer.evaluate, training_run.score_best, memory.free_memory
    if case.get("crowded"):
        memory.free_memory = lambda: 0  # no rank has room for whole weights

    def evaluate_at_last(trainer: Trainer) -> Any:
        peaks.setdefault("training", peak())
        return evaluate(trainer)

    def score_spoilt(engine: Any, *arguments: Any) -> Any:
        spoil(engine)  # only what is read from best/ can give the scores of best/
        gc.collect()
        reset_peak()
        results = score_best(engine, *arguments)
        peaks["scoring"] = peak()
        return results

    Trainer.evaluate, training_run.score_best = evaluate_at_last, score_spoilt  # type: ignore[method-assign]
    try:
        gc.collect()
        before = reset_peak()
        training_run.train(resolved, ranks, corpus, Start(), lambda _: None)
    finally:
        Trainer.evaluate, training_run.score_best = evaluate, score_best  # type: ignore[method-assign]
        memory.free_memory = free_memory
    if case.get("again"):  # as if the scoring had died: the run is not finished, and has nothing left to train
        if ranks.is_main:
            run_directory.write_status(run_dir, "failed")
            (run_dir / "predictions" / "test.csv").unlink()
        dist.barrier()
        start = find_start(resolved, "auto")
        training_run.train(resolved, ranks, corpus, start, lambda _: None)
    if ranks.is_main:
        model, processor = load_translator(run_dir / "best")
        settings_ = resolved.recipe.evaluation
        rows = translate_split(model, corpus.splits["test"], processor, batch_frames=settings_.batch_frames)
        write_predictions(run_dir / "of_its_user.csv", rows)
    dist.barrier()
    return {name: value - before for name, value in peaks.items()}


def spoil(engine: Any) -> None:
    """Change the trained weights that the next forward pass would use."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            pieces = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            pieces.data.add_(torch.ones((), dtype=pieces.dtype))


def reset_peak() -> int:
    """Let the peak begin anew; returns the bytes that this process holds in memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes of memory that this process has held since the peak began anew."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
