"""Translate and score whole splits, each beside its floors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from toolkit.corpus.packed import Corpus
from toolkit.evaluation.floors import floors
from toolkit.evaluation.generate import evaluation_mode, translate_split
from toolkit.evaluation.metrics import Scores, score
from toolkit.evaluation.predictions import Prediction
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.schema import Evaluation


@dataclass(frozen=True)
class SplitResult:
    """What a model makes of one split.

    Attributes:
        predictions: in the order of the split.
        scores: of all of them.
        floors: what one scores without watching, by kind.
    """

    predictions: list[Prediction]
    scores: Scores
    floors: dict[str, Scores]


def splits_to_test(corpus: Corpus) -> list[str]:
    """Every test split; where a corpus has none, what comes nearest to one."""
    tests = [name for name in corpus.splits if name.startswith("test") and len(corpus.splits[name])]
    others = [name for name in corpus.splits if name in ("dev", "train") and len(corpus.splits[name])]
    return tests or sorted(others)[:1]


def score_splits(
    model: PoseTranslator,
    processor: Any,
    corpus: Corpus,
    names: Iterable[str],
    settings: Evaluation,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, SplitResult]:
    """Translate and score splits; all ranks must call this, and all get the result.

    Args:
        model: says itself how to search.
        processor: gives the tokenizer.
        corpus: has the splits; its training texts give the floors.
        names: which splits.
        settings: batch budget and how to score.
        rank, world_size: which of how many ranks this is.
    """
    comparable: dict[str, Any] = {"tokenize": settings.tokenize, "lowercase": settings.lowercase}
    results = {}
    for name in names:
        with evaluation_mode(model):
            predictions = translate_split(
                model,
                corpus.splits[name],
                processor,
                batch_frames=settings.batch_frames,
                rank=rank,
                world_size=world_size,
            )
        references = [row.reference for row in predictions]
        results[name] = SplitResult(
            predictions,
            score([row.hypothesis for row in predictions], references, **comparable),
            floors(list(corpus.splits["train"].texts), references, **comparable),
        )
    return results
