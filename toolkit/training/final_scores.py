"""The final scores of a run: those of ``best/``, computed by the engine that trained it.

The engine stays. A run that partitions or offloads its model may have no room for a second one, nor to load it whole.
The training states are released, the weights of ``best/`` replace those that were trained last, and they are gathered
where there is room for whole weights now.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.evaluation.splits import SplitResult, ready_to_translate, score_splits, with_batch_frames
from toolkit.models.loading.weights import load_weights
from toolkit.models.processor import PoseProcessor
from toolkit.recipe.schema import Evaluation
from toolkit.training.engine import release_training_states


def score_best(
    engine: Any,
    folder: Path,
    processor: PoseProcessor,
    corpus: Corpus,
    names: list[str],
    settings: Evaluation,
    ranks: Ranks,
) -> dict[str, SplitResult]:
    """Translate and score splits with the weights of a model folder; all ranks call this, and all get the result.

    The engine, at any ZeRO stage, is the one that wrote the folder; it cannot train afterwards.

    Raises:
        UserError: the folder does not hold the weights of the engine's model.
    """
    release_training_states(engine)
    gc.collect()
    load_weights(folder, engine.module)
    frames = np.concatenate([corpus.splits[name].frames for name in names])
    settings = with_batch_frames(
        settings, engine.module, engine.device, frames, gathers=engine.zero_optimization_stage() == 3
    )
    with ready_to_translate(engine, frames, settings) as synced:
        return score_splits(
            engine.module,
            processor,
            corpus,
            names,
            settings,
            rank=ranks.data_parallel_rank,
            world_size=ranks.data_parallel_size,
            synced=synced,
        )
