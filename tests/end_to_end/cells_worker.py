"""One rank of test_cells.py: trains one tiny model after another, each in its own cell of the compatibility table.

An error of a cell is that cell's result, and the next one starts.
"""

from __future__ import annotations

import functools
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.rank_workers import Worker, change_weights, joined, steps_of
from toolkit.batching.collate import Batch
from toolkit.batching.loader import train_batches
from toolkit.checkpointing import run_directory
from toolkit.checkpointing.checkpoints import Progress, SavedState, name_of, read_state
from toolkit.checkpointing.random_states import seed_everything
from toolkit.checkpointing.reader import load_checkpoint
from toolkit.checkpointing.writer import CheckpointWriter
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.swap_files import claim_swap_folders, remove_swap_folders, swap_to_this_node
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loading.load import load_translator
from toolkit.models.loading.weights import saved_state_dict
from toolkit.models.loss import token_loss
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.training.engine import make_engine
from toolkit.training.monitoring.gradient_guard import GradientGuard
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start

STEPS = 3
UNUSED = SavedState(Progress(), layout={}, optimizer="", recipe={}, corpus={}, base="", counters={})


def main() -> None:
    with joined() as worker:
        worker.write(results_of(worker))


def results_of(worker: Worker) -> dict[str, dict[str, Any]]:
    """What each case came to, by name."""
    plan, folder, ranks = worker.plan, worker.folder, worker.ranks
    corpus = Corpus.open(plan["corpus"])
    writer = CheckpointWriter(folder / "checkpoints", UNUSED, keep_last=1, echo=print)
    cases: dict[str, Callable[[int], dict[str, Any]]] = {
        f"recipe {name}": functools.partial(train_recipe, name, overrides, corpus, folder / name, ranks)
        for name, overrides in plan["recipes"].items()
    }
    for name, overrides in plan["cells"].items():
        cases[name] = functools.partial(train_cell, overrides, corpus, writer, ranks)
    results = {}
    for number, (name, case) in enumerate(cases.items()):
        started = time.monotonic()
        try:
            outcome = case(number)
        except Exception as error:  # an error of a case is that case's result
            outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        results[name] = outcome | {"seconds": round(time.monotonic() - started, 3)}
        gc.collect()
        gc.freeze()  # DeepSpeed collects many times while it builds an engine, over all that earlier ones have left
    writer.close()
    return results


def train_cell(
    overrides: list[str], corpus: Corpus, writer: CheckpointWriter, ranks: Ranks, number: int
) -> dict[str, Any]:
    """Three steps on one batch, then a checkpoint, scrambled weights and the checkpoint again."""
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=torch.cuda.is_available())
    with swap_folders(resolved, ranks):
        return train_resolved(resolved, corpus, writer, ranks, number)


@contextmanager
def swap_folders(resolved: ResolvedRun, ranks: Ranks) -> Iterator[None]:
    """The folders that a cell with NVMe swaps to, as a run has them."""
    folders = swap_to_this_node(resolved.deepspeed)
    if ranks.is_main:
        claim_swap_folders(folders)
    dist.barrier()
    try:
        yield
    finally:
        if ranks.is_main:
            remove_swap_folders(folders)


def train_resolved(
    resolved: ResolvedRun, corpus: Corpus, writer: CheckpointWriter, ranks: Ranks, number: int
) -> dict[str, Any]:
    seed_everything(resolved.recipe.training.seed)
    tokenizer = build_processor(resolved.recipe, corpus).tokenizer
    model = build_translator(resolved, corpus, tokenizer)
    engine, _ = make_engine(model, resolved)
    batch = first_batch(resolved, corpus, tokenizer, ranks).to(engine.device)
    engine.train()
    watch = GradientGuard(engine.module)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(engine, batch)
        engine.backward(loss)
        if not losses:
            watch.check(watch.count(engine.device).item())
        engine.step()
        losses.append(mean_over_ranks(loss.detach()))
    engine.eval()
    before = logits_of(engine, batch)
    writer.identity = replace(UNUSED, layout=run_directory.layout_of(resolved))
    writer.save(engine, Progress(step=number))
    writer.wait()
    change_weights(engine)
    checkpoint = writer.folder / name_of(number)
    load_checkpoint(engine, checkpoint, read_state(checkpoint), layout=writer.identity.layout, seed=0)
    after = logits_of(engine, batch)
    engine.destroy()
    return {"losses": losses, "restored": bool(torch.equal(before, after))}


def train_recipe(
    name: str, overrides: list[str], corpus: Corpus, run_dir: Path, ranks: Ranks, _: int
) -> dict[str, Any]:
    """A whole short run of a recipe by its own DeepSpeed JSON: training, evaluation, the best model on disk."""
    resolved = resolve_named(name, [*overrides, f"run.dir={run_dir}"], ranks.world_size, has_gpu=False)
    if ranks.is_main:
        run_directory.start(resolved, corpus)
    dist.barrier()
    interruptions = Interruptions()
    with open_trainer(resolved, ranks, corpus, Start(), interruptions, lambda _: None) as trainer:
        trainer.run(start_loader(resolved, ranks, corpus, trainer.progress))
        saved = saved_state_dict(trainer.engine.module, keep=True)
        trainer.engine.destroy()
    interruptions.close()
    loaded = load_translator(run_dir / "best")[0].state_dict()
    return {
        "losses": [entry["loss"] for entry in steps_of(run_dir)],
        "restored": all(torch.equal(loaded[name].to(tensor.dtype), tensor) for name, tensor in saved.items()),
    }


def first_batch(resolved: ResolvedRun, corpus: Corpus, tokenizer: Any, ranks: Ranks) -> Batch:
    batches = train_batches(
        corpus.splits["train"], tokenizer, resolved, landmark_set=corpus.landmark_set, epoch=0, start_step=0,
        rank=ranks.rank,
    )  # fmt: skip
    batch = next(iter(batches))[0]
    batches.close()
    return batch


def loss_of(engine: Any, batch: Batch) -> torch.Tensor:
    output = engine(poses=batch.poses, visible=batch.visible, frame_mask=batch.frame_mask, labels=batch.labels)
    return token_loss(output.logits, batch.labels, 0.0) / batch.num_target_tokens


def mean_over_ranks(value: torch.Tensor) -> float:
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


@torch.no_grad()
def logits_of(engine: Any, batch: Batch) -> torch.Tensor:
    output = engine(poses=batch.poses, visible=batch.visible, frame_mask=batch.frame_mask, labels=batch.labels)
    return output.logits.float()


if __name__ == "__main__":
    main()
