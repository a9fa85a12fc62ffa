"""Training texts that are longer than ``training.max_target_tokens``: count them, and warn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.recipe.schema import Recipe
from toolkit.tracking.tracker import Tracker

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class TruncatedTexts:
    """Texts of which only the first tokens are trained on."""

    count: int  # number of truncated texts
    total: int  # number of texts
    longest: int  # tokens of the longest one


def find_truncated_texts(texts: Sequence[str], tokenizer: Any, max_target_tokens: int) -> TruncatedTexts | None:
    """Count the texts that ``collate.target_labels`` truncates; None where there are none."""
    # A tokenizer makes at most one token of a byte, and a few more where it normalises letters, so short texts need not
    # be tokenised.
    frame = 1 + len(tokenizer(text_target="")["input_ids"])
    suspects = [text for text in texts if frame + 2 * len(text.encode()) > max_target_tokens]
    if not suspects:
        return None
    lengths = [len(ids) for ids in tokenizer(text_target=suspects)["input_ids"]]
    count = sum(length > max_target_tokens for length in lengths)
    return TruncatedTexts(count, len(texts), max(lengths)) if count else None


def warn_of_truncated_texts(
    recipe: Recipe, texts: Sequence[str], tokenizer: Any, tracker: Tracker, step: int, echo: Callable[[str], None]
) -> None:
    """Warn of truncated texts on the terminal, in the log (and so in the report) and in the run's figures.

    The tracker gets one event, before the first step.
    """
    limit = recipe.training.max_target_tokens
    truncated = find_truncated_texts(texts, tokenizer, limit)
    if truncated is None:
        return
    longest = truncated.longest
    settings = f"training.max_target_tokens={longest} trains on them whole"
    if longest > recipe.evaluation.max_new_tokens:
        settings += f", evaluation.max_new_tokens={longest} lets the model write them"
    text = (
        f"{truncated.count} of {truncated.total} training texts have more than training.max_target_tokens={limit} "
        f"tokens and are truncated, the longest has {longest}: {settings}"
    )
    echo(f"warning: {text}")
    log.warning(text)
    if step == 0:
        figures: dict[str, float | str] = {
            "warning": text,
            "texts_cut": truncated.count,
            "longest_text_tokens": longest,
        }
        tracker.log(step, figures, kind="event")
