"""One rank of test_final_scores.py: whole trainings, and the memory of training and of scoring."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.rank_workers import change_weights, run_cases, start_run
from toolkit.checkpointing import run_directory
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.cpu.allocator import return_freed_memory
from toolkit.decoding.decode_split import translate_split
from toolkit.models.loading.load import load_translator
from toolkit.planning import memory
from toolkit.recipe.batches import most_batch_frames
from toolkit.scoring.predictions import write_predictions
from toolkit.training import final_scores
from toolkit.training import run as training_run
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.start import Start, find_start
from toolkit.training.trainer import Trainer


def main() -> None:
    return_freed_memory()  # memory that is freed no longer counts as held
    training_run.open_run = in_this_group
    run_cases(train)


@contextmanager
def in_this_group(resolved: Any, ranks: Ranks, corpus: Corpus) -> Iterator[Interruptions]:
    """Stands for ``open_run``, which would open and close a process group for each case."""
    interruptions = Interruptions()
    try:
        yield interruptions
    finally:
        interruptions.close()


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> list[dict[str, int]]:
    """Train and score a case.

    Returns:
        bytes of each rank, above those that were held before the run: ``training`` and ``scoring``, the peaks;
        ``tensors``, all tensors while the best model translates; and ``model``, one copy of its weights.
    """
    resolved, corpus = start_run(case, settings, run_dir, ranks)
    measured: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        if case.get("crowded"):
            patch.setattr(memory, "free_memory", lambda *_: 0)  # no rank has room for whole weights
        evaluate, score_best, score_splits = Trainer.evaluate, training_run.score_best, final_scores.score_splits

        def measured_evaluate(trainer: Trainer) -> Any:
            measured.setdefault("training", peak())
            return evaluate(trainer)

        def measured_score_best(engine: Any, *arguments: Any) -> Any:
            change_weights(engine)  # only weights that are read from best/ give the scores of best/
            gc.collect()
            reset_peak()
            results = score_best(engine, *arguments)
            measured["scoring"] = peak()
            return results

        def measured_score_splits(model: Any, *arguments: Any, **options: Any) -> Any:
            measured["tensors"] = bytes_of_tensors() - tensors_before
            weights = [getattr(weight, "ds_shape", weight.shape).numel() for weight in model.parameters()]
            measured["model"] = sum(weights) * torch.float32.itemsize
            return score_splits(model, *arguments, **options)

        patch.setattr(Trainer, "evaluate", measured_evaluate)
        patch.setattr(training_run, "score_best", measured_score_best)
        patch.setattr(final_scores, "score_splits", measured_score_splits)
        gc.collect()
        tensors_before, before = bytes_of_tensors(), reset_peak()
        training_run.train(resolved, ranks, corpus, Start(), lambda _: None)
    if case.get("again"):  # as after a crash of the scoring: the run is not finished, and has nothing left to train
        if ranks.is_main:
            run_directory.write_status(run_dir, "failed")
            (run_dir / "predictions" / "test.csv").unlink()
        dist.barrier()
        start = find_start(resolved, "auto")
        training_run.train(resolved, ranks, corpus, start, lambda _: None)
    if ranks.is_main:
        model, processor = load_translator(run_dir / "best")
        batch_frames = most_batch_frames(resolved.recipe.evaluation)
        rows = translate_split(model, corpus.splits["test"], processor, batch_frames=batch_frames)
        write_predictions(run_dir / "of_its_user.csv", rows)
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, measured | {name: measured[name] - before for name in ("training", "scoring")})
    return everyone


def bytes_of_tensors() -> int:
    """Bytes of all tensors of this process; views share theirs."""
    gc.collect()
    storages = [value.untyped_storage() for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def reset_peak() -> int:
    """Reset the peak; returns the bytes that this process holds in memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes of memory that this process has held since :func:`reset_peak`."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
