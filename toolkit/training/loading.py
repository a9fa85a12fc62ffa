"""What the ranks of a run learn from: their batches, from workers that start before the run does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from toolkit.batching.loader import TrainBatches, train_batches
from toolkit.batching.workers import AwaitedTokenizer
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.models import PoseProcessor
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.checkpoints import Progress

PROCESSOR = "processor"  # folder in the run directory


def all_batches(
    resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, progress: Progress, tokenizer: Any
) -> TrainBatches:
    """What this rank learns from, from where the run stands on without end: more than any run takes."""
    return train_batches(
        corpus.splits["train"],
        tokenizer,
        resolved,
        landmark_set=corpus.landmark_set,
        epoch=progress.epoch,
        start_step=progress.epoch_step,
        epochs=None,
        rank=ranks.rank,
    )


@contextmanager
def loading(
    resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, progress: Progress
) -> Iterator[tuple[TrainBatches, AwaitedTokenizer]]:
    """The same, from workers that start now, before this process has threads; the run's tokenizer comes later."""
    tokenizer = AwaitedTokenizer(lambda: PoseProcessor.from_pretrained(resolved.run_dir / PROCESSOR).tokenizer)
    with closing(all_batches(resolved, ranks, corpus, progress, tokenizer)) as batches:
        try:
            yield batches, tokenizer
        finally:
            tokenizer.announce()  # a worker that waits for it does not hear that it is over
