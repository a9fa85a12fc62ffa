"""Translating and scoring a split with the weights that are being trained, and what that says of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus, Split
from toolkit.decoding.decode_split import evaluation_mode, translate_split
from toolkit.decoding.whole_weights import whole_weights
from toolkit.models.processor import PoseProcessor
from toolkit.planning.memory import fits_whole
from toolkit.recipe.schema import Evaluation
from toolkit.scoring.floors import typical_sentence
from toolkit.scoring.metrics import Scores, score
from toolkit.scoring.predictions import Prediction
from toolkit.scoring.table import format_score
from toolkit.training.monitoring.alarms import collapse_warning

# Scores that a line has room for.
SHOWN_SCORES = ("bleu4", "chrf", "wer", "cer")


@dataclass(frozen=True)
class Evaluated:
    """A split, translated."""

    predictions: list[Prediction]
    scores: Scores

    def line(self) -> str:
        """The scores in a line."""
        values = self.scores.values()
        names = [name for name in SHOWN_SCORES if name in values]
        return "  ".join(f"{name} {format_score(name, values[name])}" for name in names)


@contextmanager
def ready_to_translate(engine: Any, frames: npt.NDArray[np.integer], settings: Evaluation) -> Iterator[bool]:
    """Within it the engine's model translates; all ranks must enter.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage.
        frames: of each clip that is to be translated.
        settings: of the search, and how large a batch may be.

    Yields:
        whether ranks must generate in step, because there is no room for whole weights.
    """
    gather = engine.zero_optimization_stage() == 3 and fits_whole(
        engine,
        frames=frames,
        batch_frames=settings.batch_frames,
        beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
    )
    with evaluation_mode(engine.module), whole_weights(engine, gather=gather) as synced:
        yield synced


def evaluate_split(
    engine: Any, split: Split, processor: PoseProcessor, settings: Evaluation, ranks: Ranks
) -> Evaluated:
    """Translate and score a split with the engine's weights as they are; all ranks must call this."""
    with ready_to_translate(engine, split.frames, settings) as synced:
        predictions = translate_split(
            engine.module,
            split,
            processor,
            batch_frames=settings.batch_frames,
            rank=ranks.rank,
            world_size=ranks.world_size,
            synced=synced,
        )
    hypotheses = [row.hypothesis for row in predictions]
    return Evaluated(predictions, _score(hypotheses, [row.reference for row in predictions], settings))


def warn_of_collapse(evaluated: Evaluated, corpus: Corpus, epoch: int, settings: Evaluation) -> str | None:
    """What to warn of when the model says the same to every clip, or scores like a sentence that is always the same."""
    references = [row.reference for row in evaluated.predictions]
    name = settings.select_by
    constant = [typical_sentence(corpus.splits["train"].texts)] * len(references)
    return collapse_warning(
        epoch,
        [row.hypothesis for row in evaluated.predictions],
        references,
        name,
        evaluated.scores.values()[name],
        _score(constant, references, settings).values()[name],
    )


def _score(hypotheses: list[str], references: list[str], settings: Evaluation) -> Scores:
    return score(hypotheses, references, tokenize=settings.tokenize, lowercase=settings.lowercase)
