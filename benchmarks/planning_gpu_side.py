"""One rank of a run of benchmarks/planning_gpu.py: some steps, an evaluation and saves, and the peak of each phase.

python -m tests.pretended_cuda python benchmarks/planning_gpu_side.py ORDER.json

Kernels compute nothing (``PRETENDED_CUDA_NUMBERS=0``), so that shapes alone decide what is allocated.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from toolkit.batching.loader import train_batches
from toolkit.cluster.ranks import read_ranks
from toolkit.cluster.rendezvous import exchange
from toolkit.corpus.packed import Corpus
from toolkit.decoding import beam_search, decode_split
from toolkit.recipe.resolve import resolve_named
from toolkit.training import trainer as training
from toolkit.training.memory_report import compare_memory
from toolkit.training.run import open_run, open_trainer
from toolkit.training.start import Start

ENTRIES = 10_000_000  # of the allocator's history


def main(order: dict[str, Any], out: Path) -> None:
    ranks = read_ranks()
    resolved = resolve_named(order["recipe"], order["overrides"], ranks.world_size, has_gpu=True, ds=order["ds"])
    corpus = Corpus.open(Path(resolved.recipe.data.corpus or ""))
    look_at_no_numbers()
    with ExitStack() as stack:
        interruptions = stack.enter_context(open_run(resolved, ranks, corpus))
        if order["history"]:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES, stacks="python")
        trainer = stack.enter_context(open_trainer(resolved, ranks, corpus, Start(), interruptions, lambda _: None))
        trainer.engine.train()
        trainer.memory.enter("step")
        batches = train_batches(
            trainer.train_split, trainer.processor.tokenizer, resolved, landmark_set=corpus.landmark_set,
            epoch=0, start_step=0, epochs=None, rank=ranks.rank,
        )  # fmt: skip
        step = next(batches)
        for _ in range(order["steps"]):
            trainer.step(step)
        trainer.evaluate()
        trainer.step(step)  # beside what a search leaves, as most steps of a run are
        trainer.save()
        trainer.checkpoints.wait()
        computed = compare_memory(trainer)
        assert computed is not None
        if order["history"]:
            torch.cuda.memory._dump_snapshot(f"{order['history']}_{ranks.rank}.pickle")
        if ranks.is_main:
            row = {"peaks": trainer.memory.of_ranks, "computed": asdict(computed)}
            row["rows"] = len(trainer.processor.tokenizer)
            out.write_text(json.dumps(row), encoding="utf-8")


def look_at_no_numbers() -> None:
    """Have a run whose kernels compute nothing train and search on: its numbers may be anything."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage3, stage_1_and_2):
        module.is_invalid_grad_norm = lambda _: False
    for optimizer in (stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        optimizer.has_overflow = lambda *_, **__: False  # such steps would be skipped
    decode_split._gather = gathered_rows
    training.check_losses = lambda *_: None
    training.GradientGuard = lambda *_, **__: None  # type: ignore[assignment, misc]
    beam_search._Search._drop = drop_at_the_end  # type: ignore[method-assign]
    beam_search._Search.result = nothing_found  # type: ignore[method-assign]


def gathered_rows(rows: list[Any], world_size: int) -> list[Any]:
    """All ranks' rows, sorted by clip; a collective would lose what it sends."""
    return sorted(chain.from_iterable(exchange(rows)), key=lambda row: row[0])


def drop_at_the_end(search: Any, rows: Tensor, length: int) -> Any:
    """Every text has the most tokens that it may have."""
    if length < search.config.max_length:
        return rows.flatten(), None
    search.running, search.is_done = search.running[:0], search.is_done[:0]
    return rows[:0], None


def nothing_found(search: Any) -> Any:
    """A text without a token for each clip."""
    clips, returned = len(search.results.texts), search.config.num_return_sequences
    device = search.results.texts.device
    texts = torch.full((clips * returned, search.prompt), search.padding).to(device)
    return GenerateBeamEncoderDecoderOutput(sequences=texts, sequences_scores=torch.zeros(clips * returned).to(device))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # nothing of the runtime is left to close
