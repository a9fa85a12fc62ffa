"""One rank of test_fitting.py: fits runs to this machine, joins the process group, and trains a step of each."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.rank_workers import Worker, once_for_all_engines
from tests.recorded_calls import RecordedCalls
from toolkit.batching.collate import Batch
from toolkit.checkpointing import run_directory
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import Ranks, read_ranks
from toolkit.cluster.rendezvous import join_rendezvous
from toolkit.corpus.packed import Corpus
from toolkit.fitting import rehearsal_engine
from toolkit.fitting.bounds import UNKNOWN, Passes
from toolkit.fitting.micro_batches import fit_micro_batches
from toolkit.models.loading.weights import whole_state_dict
from toolkit.planning.sizes.shapes import lengths_of
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.training import pass_graphs
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start


def main() -> None:
    use_extensions_dir()
    once_for_all_engines()
    worker = Worker(json.loads(Path(sys.argv[-1]).read_text()), read_ranks())
    ranks = worker.ranks
    log_to_file(None)
    join_rendezvous(ranks)
    runs = {name: fitted(case, worker) for name, case in worker.plan["cases"].items()}
    join_process_group(ranks)
    results: dict[str, Any] = {}
    for name, run in runs.items():
        longest = lengths_of(run, Corpus.open(run.recipe.data.corpus or "").splits["train"]).longest
        results[name] = {"choice": asdict(run.choice) if run.choice else None, "longest": longest}
        if worker.plan["cases"][name].get("trains"):
            results[name]["weights"] = weights_after_a_step(run, ranks)
    worker.write(results)
    leave_process_group()


def fitted(case: dict[str, Any], worker: Worker) -> ResolvedRun:
    """A case with its micro-batches: those that it names, else those that a rehearsal chooses."""
    ranks, folder = worker.ranks, worker.folder / case["folder"]
    overrides = [
        *worker.plan["settings"],
        *case.get("overrides", []),
        "training.micro_batch_size=auto",
        f"run.dir={folder}",
    ]
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=False, ds=case["ds"])
    if given := case.get("given"):
        return resolved.with_choice(MicroBatchChoice(**given))
    corpus = Corpus.open(resolved.recipe.data.corpus or "")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # another case has made its choice for the same settings
    longest = lengths_of(resolved, corpus.splits["train"]).longest
    with out_of_memory(case.get("breaks"), longest, ranks):
        return fit_micro_batches(resolved, ranks, corpus, lambda _: None)


@contextmanager
def out_of_memory(where: str | None, frames: int, ranks: Ranks) -> Iterator[None]:
    """Within it the last rank has no memory for more padded frames: in a pass, an update or a capture."""
    own, own_capture = rehearsal_engine.batch_losses, pass_graphs.capture_on
    recorded, under_way = RecordedCalls(), [False]

    def capture(call: Any) -> Any:
        under_way[0] = True
        result = recorded(call)
        under_way[0] = False
        return result

    own_bound = Passes.at_most
    if where in ("update", "capture"):  # which only a whole step has
        Passes.at_most = lambda *_: UNKNOWN  # type: ignore[method-assign]
    if where == "capture":
        pass_graphs.capture_on = lambda device: capture

    def breaking(engine: Any, batch: Batch, *arguments: Any, **settings: Any) -> Any:
        if ranks.rank < ranks.world_size - 1 or batch.frame_mask.numel() <= frames:
            return own(engine, batch, *arguments, **settings)
        if where == "capture":
            return raise_out_of_memory() if under_way[0] else own(engine, batch, *arguments, **settings)
        if where == "forward":
            hook = engine.module.backbone.get_decoder().register_forward_pre_hook(raise_out_of_memory)
            try:
                return own(engine, batch, *arguments, **settings)
            finally:
                hook.remove()
        if where == "update":
            engine.step = raise_out_of_memory
        nll, ctc = own(engine, batch, *arguments, **settings)
        if where == "backward":
            weight = next(weight for weight in engine.module.parameters() if weight.requires_grad)
            weight.register_hook(raise_out_of_memory)
        return nll, ctc

    rehearsal_engine.batch_losses = breaking
    try:
        yield
    finally:
        rehearsal_engine.batch_losses, pass_graphs.capture_on = own, own_capture
        Passes.at_most = own_bound  # type: ignore[method-assign]


def raise_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("injected")


def weights_after_a_step(run: ResolvedRun, ranks: Ranks) -> str:
    """A hash of all weights after the first step."""
    corpus = Corpus.open(run.recipe.data.corpus or "")
    if ranks.is_main:
        run_directory.start(run, corpus)
    dist.barrier()
    interruptions, start = Interruptions(), Start()
    with open_trainer(run, ranks, corpus, start, interruptions, lambda _: None) as trainer:
        batches = start_loader(run, ranks, corpus, trainer.progress)
        batches.set_tokenizer(trainer.processor.tokenizer)
        trainer.engine.train()
        trainer.step(next(batches))
        weights = whole_state_dict(trainer.engine.module, keep=True)
        trainer.engine.destroy()
    interruptions.close()
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
