"""Texts that are longer than the targets that a run learns: how many, and what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.recipe.schema import Recipe
from toolkit.tracking.tracker import Tracker

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class CutTexts:
    """Texts of which a model learns only the beginning.

    Attributes:
        count: how many.
        of: among how many.
        longest: tokens of the longest one.
    """

    count: int
    of: int
    longest: int


def find_cut_texts(texts: Sequence[str], tokenizer: Any, max_target_tokens: int) -> CutTexts | None:
    """Count the texts that ``collate.target_labels`` cuts; None where it cuts none."""
    # Tokenizers make one token of a byte at most, and a few more where they normalise letters: the short texts of a
    # large corpus need not be tokenised once more.
    frame = 1 + len(tokenizer(text_target="")["input_ids"])
    suspects = [text for text in texts if frame + 2 * len(text.encode()) > max_target_tokens]
    if not suspects:
        return None
    lengths = [len(ids) for ids in tokenizer(text_target=suspects)["input_ids"]]
    cut = sum(length > max_target_tokens for length in lengths)
    return CutTexts(cut, len(texts), max(lengths)) if cut else None


def warn_of_cut_texts(
    recipe: Recipe, texts: Sequence[str], tokenizer: Any, tracker: Tracker, step: int, echo: Callable[[str], None]
) -> None:
    """Say what is cut, on the terminal, in the log (and so in the report) and in the run's figures.

    Args:
        recipe: the run's.
        texts: of the training split.
        tokenizer: the run's.
        tracker: hears of it once, before the first step.
        step: optimizer steps done so far.
        say: prints a line.
    """
    limit = recipe.training.max_target_tokens
    cut = find_cut_texts(texts, tokenizer, limit)
    if cut is None:
        return
    unwritten = cut.longest > recipe.evaluation.max_new_tokens
    text = (
        f"{cut.count} of {cut.of} training texts are longer than training.max_target_tokens={limit} and are learnt as "
        f"if they ended there; the longest has {cut.longest} tokens: training.max_target_tokens={cut.longest} learns "
        f"them whole{f', evaluation.max_new_tokens={cut.longest} lets them be written' if unwritten else ''}"
    )
    echo(f"warning: {text}")
    log.warning(text)
    if step == 0:
        figures: dict[str, float | str] = {"warning": text, "texts_cut": cut.count, "longest_text_tokens": cut.longest}
        tracker.log(step, figures, kind="event")
