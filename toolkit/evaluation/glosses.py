"""The error rate of the glosses that a CTC head reads, beside the scores of the texts."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.decoding.search import Hypothesis
from toolkit.scoring.addends import Measure, gloss_errors


def glosses_read(
    found: Sequence[Sequence[Hypothesis]], wanted: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]] | None:
    """The glosses that the model has read of each clip, and those of the corpus; None where either has none."""
    read = [of_clip[0].gloss for of_clip in found]
    if not wanted or not all(wanted) or any(gloss is None for gloss in read):
        return None
    return [gloss or "" for gloss in read], wanted


def gloss_measure(glosses: tuple[Sequence[str], Sequence[str]] | None) -> list[Measure]:
    """What each clip adds to the error rate of glosses; empty where there are none."""
    return [gloss_errors(*glosses)] if glosses else []
