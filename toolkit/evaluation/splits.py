"""Translate and score whole splits, each with its floors, confidence intervals and control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from toolkit.corpus.packed import Corpus, Split
from toolkit.decoding.decode_split import best_predictions, evaluation_mode, find_hypotheses
from toolkit.decoding.search import Hypothesis
from toolkit.decoding.whole_weights import whole_weights
from toolkit.evaluation.glosses import gloss_measure, glosses_read
from toolkit.models.translator import PoseTranslator
from toolkit.planning.memory import fits_whole, fitting_batch_frames
from toolkit.recipe.batches import most_batch_frames
from toolkit.recipe.schema import Evaluation
from toolkit.scoring.addends import frequent_words, measure
from toolkit.scoring.floors import floors, other_clips
from toolkit.scoring.groups import group_scores
from toolkit.scoring.metrics import Scores, add_up
from toolkit.scoring.predictions import Prediction
from toolkit.scoring.resampling import Comparison, Interval, compare, intervals


@dataclass(frozen=True)
class SplitResult:
    """Translations of one split and their scores."""

    predictions: list[Prediction]  # in the order of the split
    scores: Scores  # of all of them
    floors: dict[str, Scores]  # of translators that see no poses, by kind
    intervals: dict[str, Interval] = field(default_factory=dict)  # hold 95 % of each score's resampled values
    against_control: dict[str, Comparison] = field(default_factory=dict)  # first: on other clips' poses; second: own
    n_best: list[list[Hypothesis]] = field(default_factory=list)  # of each clip, best first
    groups: dict[str, dict[str, Scores]] = field(default_factory=dict)  # of each signer, language, length of sentence

    def summary(self) -> dict[str, Any]:
        """Scores, intervals and floors by name, ready for JSON."""
        return {
            "clips": self.scores.clips,
            "scores": self.scores.values(),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "floors": {kind: scores.values() for kind, scores in self.floors.items()},
            "groups": {
                kind: {name: {"clips": scores.clips, **scores.values()} for name, scores in groups.items()}
                for kind, groups in self.groups.items()
            },
        }


def splits_to_test(corpus: Corpus) -> list[str]:
    """Every test split; dev in a corpus without one, and train in a corpus without dev."""
    tests = [name for name in corpus.splits if name.startswith("test") and len(corpus.splits[name])]
    others = [name for name in corpus.splits if name in ("dev", "train") and len(corpus.splits[name])]
    return tests or sorted(others)[:1]


def with_batch_frames(
    settings: Evaluation,
    model: PoseTranslator,
    device: torch.device,
    frames: npt.NDArray[np.integer],
    *,
    gathers: bool = False,
    most: int | None = None,
) -> Evaluation:
    """The settings with a number where ``batch_frames`` is ``auto``; all ranks must call this.

    Args:
        settings: those of the evaluation.
        model: that translates.
        device: that it computes on.
        frames: of each clip.
        gathers: whether the weights are partitioned, and gathered to translate.
        most: padded frames that are not exceeded; None = as many as a run may choose.
    """
    if settings.batch_frames != "auto":
        return settings
    size = fitting_batch_frames(
        model,
        device,
        frames=frames,
        most=most or most_batch_frames(settings),
        beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        gathers=gathers,
        graphs=settings.graphs,
    )
    return settings.model_copy(update={"batch_frames": size})


@contextmanager
def ready_to_translate(engine: Any, frames: npt.NDArray[np.integer], settings: Evaluation) -> Iterator[bool]:
    """Within it the engine's model translates clips of so many ``frames``; all ranks must enter.

    Yields:
        whether ranks must generate in step, because whole weights do not fit.
    """
    gather = engine.zero_optimization_stage() == 3 and fits_whole(
        engine,
        frames=frames,
        batch_frames=most_batch_frames(settings),
        beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        graphs=settings.graphs,
    )
    with evaluation_mode(engine.module), whole_weights(engine, gather=gather) as synced:
        yield synced


def score_splits(
    model: PoseTranslator,
    processor: Any,
    corpus: Corpus,
    names: Iterable[str],
    settings: Evaluation,
    *,
    rank: int = 0,
    world_size: int = 1,
    synced: bool = False,
    n_best: int = 1,
    search: Mapping[str, Any] | None = None,
    on_batch: Callable[[str, int], None] | None = None,
) -> dict[str, SplitResult]:
    """Translate and score splits; all ranks must call this, and all get the result.

    Of a mix the result has each split as a whole, and then the clips of each corpus (``named``), translated once. Texts
    of the corpus' training split give the floors and the frequent words. ``search`` are settings of HuggingFace's
    ``generate`` that override the model's own; ``on_batch`` is called with a split's name and how many of its clips
    this rank has translated. The others are as for :func:`find_hypotheses`.
    """
    results: dict[str, SplitResult] = {}
    for name in names:
        with evaluation_mode(model):
            found = find_hypotheses(
                model,
                corpus.splits[name],
                processor,
                batch_frames=most_batch_frames(settings),
                rank=rank,
                world_size=world_size,
                synced=synced,
                graphs=settings.graphs,
                n_best=n_best,
                on_batch=partial(on_batch, name) if on_batch else None,
                **(search or {}),
            )
        results |= _score_split(corpus, corpus.splits[name], found, settings)
    return results


def named(split: str, corpus: str) -> str:
    """The name of one corpus's clips in a split of a mix, in scores and files."""
    return f"{split}@{corpus}"


def _score_split(
    corpus: Corpus, split: Split, found: list[list[Hypothesis]], settings: Evaluation
) -> dict[str, SplitResult]:
    """Score one split's translations: all of them, and those of each corpus where there are several."""
    # A corpus of nothing but test clips has no training texts; its own give the floors then.
    train = corpus.splits.get("train")
    predictions = best_predictions(split, found)
    texts: Sequence[str] = list(train.texts) if train else [row.reference for row in predictions]
    said = {column: list(split.values(column)) for column in ("signer", "language", "gloss")}
    results = {split.name: _result(predictions, split.frames, texts, found, settings, said)}
    for part in split.parts if len(split.parts) > 1 else ():
        clips = slice(part.clips.start, part.clips.stop)
        own = next((one.clips for one in train.parts if one.corpus == part.corpus), None) if train else None
        results[named(split.name, part.corpus)] = _result(
            predictions[clips],
            split.frames[clips],
            texts[own.start : own.stop] if own else texts,
            found[clips],
            settings,
            {column: values[clips] for column, values in said.items()},
        )
    return results


def _result(
    predictions: list[Prediction],
    frames: npt.NDArray[np.integer],
    texts: Sequence[str],
    found: list[list[Hypothesis]],
    settings: Evaluation,
    said: dict[str, list[str]],
) -> SplitResult:
    """Score translations, with floors, intervals and control.

    ``texts`` are those of training; ``said`` is what the corpus says of each clip: its signer, language and glosses.
    """
    hypotheses, references = [row.hypothesis for row in predictions], [row.reference for row in predictions]
    scoring: dict[str, Any] = {
        "tokenize": settings.tokenize,
        "lowercase": settings.lowercase,
        "frequent_words": frequent_words(texts, settings.tokenize),
    }
    others = other_clips(frames, references)
    glosses = glosses_read(found, said["gloss"])
    of_others = ([glosses[0][other] for other in others], glosses[1]) if glosses else None
    own = measure(hypotheses, references, **scoring) + gloss_measure(glosses)
    control = measure([hypotheses[other] for other in others], references, **scoring) + gloss_measure(of_others)
    return SplitResult(
        predictions,
        add_up(own, **scoring),
        floors(texts, references, hypotheses=hypotheses, frames=frames, **scoring),
        intervals(own),
        compare(control, own),
        found,
        group_scores(own, {kind: said[kind] for kind in ("signer", "language")}, references, scoring),
    )
