"""Settings that do not go together with the corpus, as notes before the first step.

What needs no corpus is in ``toolkit/recipe/mismatches.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.corpus.mixture.leakage import leakage_notes
from toolkit.corpus.packed import KEPT_SETTINGS, Corpus
from toolkit.models.conditions import condition_notes
from toolkit.poses.landmarks import NO_LANDMARKS
from toolkit.recipe.schema import Evaluation, Recipe, Training
from toolkit.scoring.metrics import score


def setting_notes(recipe: Recipe, corpus: Corpus, tokenizer: Any, *, steps: int, epoch_steps: int) -> Iterator[str]:
    """One note for each setting that has no effect with this corpus, or that surprises."""
    training = recipe.training
    if training.save_every > steps:
        yield (
            f"training.save_every={training.save_every} and the run has {steps} steps: a crash loses all of them; set "
            f"training.save_every={max(1, steps // 4)}"
        )
    if training.freeze_backbone_steps >= steps:
        yield (
            f"training.freeze_backbone_steps={training.freeze_backbone_steps} and the run has {steps} steps: the "
            "backbone does not train"
        )
    if note := _repeated_bytes(recipe.evaluation.no_repeat_ngram_size, tokenizer):
        yield note
    yield from condition_notes(recipe, corpus, tokenizer)
    yield from leakage_notes(corpus)
    dev = corpus.splits.get("dev")
    yield from _evaluation_intervals(training, math.ceil(steps / epoch_steps) if dev else 0)
    if dev:
        yield from _search(recipe.evaluation, dev.texts, tokenizer)
    if recipe.data.corpus:
        yield from _preparation(recipe, corpus)


def _evaluation_intervals(training: Training, epochs: int) -> Iterator[str]:
    if training.eval_every > epochs > 0:
        yield (
            f"training.eval_every={training.eval_every} and the run has {epochs} epochs: the dev split is scored at "
            "the end only"
        )
    evaluations = math.ceil(epochs / training.eval_every)
    if training.early_stopping and training.early_stopping >= evaluations:
        yield (
            f"training.early_stopping={training.early_stopping} has no effect: the run scores a dev split "
            f"{evaluations} times"
        )


def _repeated_bytes(size: int, tokenizer: Any) -> str | None:
    """A note on n-grams that may not repeat where the tokens are bytes, whatever the tokenizer is called."""
    probe = "Stop नमस्ते"
    if not size or len(tokenizer(probe, add_special_tokens=False)["input_ids"]) < len(probe.encode()):
        return None
    return (
        f"evaluation.no_repeat_ngram_size={size} counts bytes with this tokenizer, and most texts repeat {size} of "
        "them: set evaluation.no_repeat_ngram_size=0"
    )


def _search(evaluation: Evaluation, references: Sequence[str], tokenizer: Any) -> Iterator[str]:
    lengths = [len(ids) for ids in tokenizer(text_target=list(references))["input_ids"]]
    if median(lengths) > evaluation.max_new_tokens:
        limit = evaluation.max_new_tokens
        longer = sum(length > limit for length in lengths)
        yield (
            f"evaluation.max_new_tokens={limit} and {longer} of {len(lengths)} dev texts are longer: "
            f"their translations are truncated; set evaluation.max_new_tokens={max(lengths)}"
        )
    name = evaluation.select_by
    if not name.startswith("bleu") or any(len(text.split()) >= int(name[-1]) for text in references):
        return
    # Texts of a script without spaces have more words than that: only the tokenizer of the score counts them.
    perfect = score(references, references, tokenize=evaluation.tokenize, lowercase=evaluation.lowercase)
    if not perfect.values()[name]:
        yield (
            f"evaluation.select_by={name} and no dev text has {name[-1]} words: every model scores 0, and the first is "
            "kept; set evaluation.select_by=chrf"
        )


def _preparation(recipe: Recipe, corpus: Corpus) -> Iterator[str]:
    pairs = {key: (getattr(recipe.data, key), getattr(corpus.metadata, key)) for key in KEPT_SETTINGS}
    if corpus.landmark_set.name != NO_LANDMARKS.name:
        pairs["landmarks"] = (Path(recipe.data.landmarks).stem, corpus.landmark_set.name)
    differing = [f"data.{key}={wanted} (corpus: {own})" for key, (wanted, own) in pairs.items() if wanted != own]
    if differing:
        have = "has" if len(differing) == 1 else "have"
        yield f"{', '.join(differing)} {have} no effect: data.corpus={recipe.data.corpus} was prepared otherwise"
