"""Training texts that are longer than ``training.max_target_tokens``: count them, and warn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from toolkit.recipe.schema import Recipe
from toolkit.tracking.tracker import Tracker

log = logging.getLogger("toolkit")


def truncated_lengths(texts: Sequence[str], tokenizer: Any, max_target_tokens: int) -> list[int]:
    """Tokens of each text that ``collate.target_labels`` truncates."""
    # A tokenizer makes at most one token of a byte, and a few more where it normalises letters, so short texts need not
    # be tokenised.
    frame = 1 + len(tokenizer(text_target="")["input_ids"])
    suspects = [text for text in texts if frame + 2 * len(text.encode()) > max_target_tokens]
    if not suspects:
        return []
    return [len(ids) for ids in tokenizer(text_target=suspects)["input_ids"] if len(ids) > max_target_tokens]


def warn_of_truncated_texts(
    recipe: Recipe, texts: Sequence[str], tokenizer: Any, tracker: Tracker, step: int, echo: Callable[[str], None]
) -> None:
    """Warn of truncated texts on the terminal, in the log (and so in the report) and in the run's figures.

    The tracker gets one event, before the first step.
    """
    limit = recipe.training.max_target_tokens
    lengths = truncated_lengths(texts, tokenizer, limit)
    if not lengths:
        return
    longest = max(lengths)
    settings = f"training.max_target_tokens={longest} trains on them whole"
    if longest > recipe.evaluation.max_new_tokens:
        settings += f", evaluation.max_new_tokens={longest} lets the model write them"
    text = (
        f"{len(lengths)} of {len(texts)} training texts have more than training.max_target_tokens={limit} "
        f"tokens and are truncated, the longest has {longest}: {settings}"
    )
    echo(f"warning: {text}")
    log.warning(text)
    if step == 0:
        figures: dict[str, float | str] = {"warning": text, "texts_cut": len(lengths), "longest_text_tokens": longest}
        tracker.log(step, figures, kind="event")
