"""One rank of test_cells.py: trains one tiny model after another, each in its own cell of the compatibility table.

Starting two ranks costs more than training a tiny model for three steps, so one start serves hundreds of cells. A cell
that fails is written down with its reason, and the next one begins.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from toolkit.batching.collate import Batch
from toolkit.batching.loader import train_batches
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.ranks import Ranks, read_ranks
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_processor, build_translator
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from toolkit.training.engine import join_process_group, leave_process_group, make_engine, quieten
from toolkit.training.guards import GradientWatch
from toolkit.training.loss import token_loss
from toolkit.training.run import seed_everything

STEPS = 3


def main() -> None:
    use_extensions_dir()
    plan = json.loads(Path(sys.argv[-1]).read_text())
    ranks = read_ranks()
    quieten(None)
    join_process_group(ranks)
    # DeepSpeed collects garbage several times an engine, over everything that the imports made.
    gc.freeze()
    results = Path(plan["results"])
    corpus = Corpus.open(plan["corpus"])
    with results.open("w") as file:
        for name, overrides in plan["cells"].items():
            started = time.monotonic()
            try:
                outcome = train(overrides, corpus, Path(plan["folder"]), ranks)
            except Exception as error:  # whatever breaks a cell is that cell's result
                outcome = {"error": f"{type(error).__name__}: {error}"}
            outcome["seconds"] = round(time.monotonic() - started, 3)
            if ranks.is_main:
                print(json.dumps({"cell": name, **outcome}), file=file, flush=True)
            gc.collect()
    leave_process_group()


def train(overrides: list[str], corpus: Corpus, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Three steps on one batch, then a checkpoint, scrambled weights and the checkpoint again."""
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=torch.cuda.is_available())
    seed_everything(resolved.recipe.training.seed)
    tokenizer = build_processor(resolved.recipe, corpus).tokenizer
    model = build_translator(resolved, corpus, tokenizer)
    engine, _ = make_engine(model, resolved)
    batch = first_batch(resolved, corpus, tokenizer, ranks).to(engine.device)
    engine.train()
    watch = GradientWatch(engine.module)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(engine, batch)
        engine.backward(loss)
        if not losses:
            watch.check(engine.device)
        engine.step()
        losses.append(mean_over_ranks(loss.detach()))
    engine.eval()
    before = logits_of(engine, batch)
    checkpoint = save_checkpoint(engine, folder / "checkpoints", Progress(step=STEPS), layout={}, keep_last=1)
    spoil(engine)
    load_checkpoint(engine, checkpoint)
    after = logits_of(engine, batch)
    engine.destroy()
    if ranks.is_main:
        shutil.rmtree(checkpoint)
    return {"losses": losses, "restored": bool(torch.equal(before, after))}


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


def spoil(engine: Any) -> None:
    """Change the trained weights that the next forward pass would use."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            pieces = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            pieces.data.add_(1.0)


if __name__ == "__main__":
    main()
