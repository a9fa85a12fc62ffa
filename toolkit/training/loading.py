"""What a rank of a run learns from."""

from __future__ import annotations

from toolkit.batching.loader import TrainBatches, train_batches
from toolkit.checkpointing.checkpoints import Progress
from toolkit.cluster.failures import without_watching
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.recipe.resolve import ResolvedRun


def all_batches(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, progress: Progress) -> TrainBatches:
    """What this rank learns from, from where the run stands on without end: more than any run takes.

    The workers start here, so a run calls it before it has threads; the run's tokenizer comes later.
    """
    with without_watching():
        return train_batches(
            corpus.splits["train"],
            None,
            resolved,
            landmark_set=corpus.landmark_set,
            epoch=progress.epoch,
            start_step=progress.epoch_step,
            epochs=None,
            rank=ranks.rank,
        )
