"""Translate and score a split with the weights that are being trained, and warn where all outputs are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Split
from toolkit.decoding.decode_split import best_predictions, find_hypotheses
from toolkit.decoding.search import Hypothesis
from toolkit.evaluation.glosses import gloss_measure, glosses_read
from toolkit.evaluation.splits import named, ready_to_translate, with_batch_frames
from toolkit.models.processor import PoseProcessor
from toolkit.recipe.batches import most_batch_frames
from toolkit.recipe.corpora import MEAN
from toolkit.recipe.schema import Evaluation
from toolkit.scoring.floors import typical_sentence
from toolkit.scoring.metrics import Scores, mean_of, score
from toolkit.scoring.predictions import Prediction
from toolkit.scoring.table import SOMETIMES, format_score

# Scores that a line has room for.
SHOWN_SCORES = ("bleu4", "chrf", "wer", "cer", "gloss_wer")
# Different hypotheses for each different reference, below which outputs count as all alike.
ALIKE_SHARE = 0.05


@dataclass(frozen=True)
class Evaluated:
    """A split, translated."""

    predictions: list[Prediction]
    scores: Scores  # of all of them
    by_corpus: dict[str, Scores] = field(default_factory=dict)  # of each corpus of a mix

    def selected(self, corpus: str) -> Scores:
        """The scores by which models are compared; see ``evaluation.select_corpus``."""
        if corpus == MEAN and self.by_corpus:
            return mean_of(list(self.by_corpus.values()))
        return self.by_corpus.get(corpus, self.scores)

    def figures(self, split: str) -> dict[str, float]:
        """The scores by name for trackers, of a split and of each corpus in it."""
        of_all = {split: self.scores} | {named(split, corpus): scores for corpus, scores in self.by_corpus.items()}
        return {
            f"{name}_{key}": value
            for name, scores in of_all.items()
            for key, value in scores.values().items()
            if value is not None
        }

    def line(self, select_by: str) -> str:
        """The scores in a line, and the one that matters of each corpus."""
        values = self.scores.values()
        names = [name for name in SHOWN_SCORES if name not in SOMETIMES or values[name] is not None]
        texts = [f"{name} {format_score(name, values[name])}" for name in names]
        for corpus, scores in self.by_corpus.items():
            texts.append(f"{corpus}: {select_by} {format_score(select_by, scores.values()[select_by])}")
        return "  ".join(texts)


def evaluate_split(
    engine: Any, split: Split, processor: PoseProcessor, settings: Evaluation, ranks: Ranks
) -> Evaluated:
    """Translate and score a split with the engine's weights as they are; all ranks must call this."""
    settings = with_batch_frames(
        settings, engine.module, engine.device, split.frames, gathers=engine.zero_optimization_stage() == 3
    )
    with ready_to_translate(engine, split.frames, settings) as synced:
        found = find_hypotheses(
            engine.module,
            split,
            processor,
            batch_frames=most_batch_frames(settings),
            rank=ranks.data_parallel_rank,
            world_size=ranks.data_parallel_size,
            synced=synced,
            graphs=settings.graphs,
        )
    predictions, glosses = best_predictions(split, found), list(split.values("gloss"))
    parts = {part.corpus: slice(part.clips.start, part.clips.stop) for part in split.parts}
    return Evaluated(
        predictions,
        _scores_of(predictions, found, glosses, settings),
        {
            corpus: _scores_of(predictions[clips], found[clips], glosses[clips], settings)
            for corpus, clips in (parts.items() if len(parts) > 1 else ())
        },
    )


def collapse_warning(evaluated: Evaluated, train_texts: Sequence[str], epoch: int, settings: Evaluation) -> str | None:
    """A warning, if the model gives almost the same text for every clip, or scores like one constant sentence.

    It names the usual causes in the order in which to check them.
    """
    hypotheses = [row.hypothesis for row in evaluated.predictions]
    references = [row.reference for row in evaluated.predictions]
    distinct, wanted = len(set(hypotheses)), len(set(references))
    if wanted < 2:
        return None
    name = settings.select_by
    value = evaluated.scores.values()[name]
    constant = [typical_sentence(train_texts)] * len(references)
    if distinct <= max(1.0, ALIKE_SHARE * wanted):
        share = 100 * distinct / len(hypotheses)
        what = f"{distinct} different sentences for {len(hypotheses)} clips ({share:.1f} %)"
    elif value is not None and value == _score(constant, references, settings).values()[name]:
        what = f"{name} {value:.4g} is exactly that of one sentence for every clip"
    else:
        return None
    return (
        f"outputs after epoch {epoch} are all alike: {what}. Usual in the first epochs; later it means that the "
        "decoder has learnt the texts and not the poses: try --overfit 8 on this data, a higher "
        "training.pose_encoder_learning_rate or training.ctc_weight=0.3, and check that poses and texts belong together"
    )


def _scores_of(
    predictions: Sequence[Prediction],
    found: Sequence[Sequence[Hypothesis]],
    glosses: Sequence[str],
    settings: Evaluation,
) -> Scores:
    """The scores of texts, and of glosses where the model reads some."""
    scores = _score([row.hypothesis for row in predictions], [row.reference for row in predictions], settings)
    for part in gloss_measure(glosses_read(found, glosses)):
        scores = replace(scores, gloss_wer=part.values(part.addends.sum(axis=0))["gloss_wer"])
    return scores


def _score(hypotheses: list[str], references: list[str], settings: Evaluation) -> Scores:
    return score(hypotheses, references, tokenize=settings.tokenize, lowercase=settings.lowercase)
