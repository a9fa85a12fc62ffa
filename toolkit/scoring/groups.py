"""Scores of parts of a split: of each signer, each sign language, and sentences of like length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.scoring.addends import Measure, rouge_tokens
from toolkit.scoring.metrics import Scores, add_up

# Most words of a reference in each group of sentences; the last group has no limit.
LENGTHS = (5, 10, 20)
UNKNOWN = "unknown"  # the group of clips whose column is empty
GROUPED_BY = {"signer": "signer", "language": "language", "length": "words of the reference"}
"""The kinds of groups, and what each is in words."""


def length_group(reference: str) -> str:
    """The group of a sentence by its number of words, as ROUGE-L counts them: "1-5", "6-10", "11-20" or "21+"."""
    words = len(rouge_tokens(reference))
    fewest = 1
    for most in LENGTHS:
        if words <= most:
            return f"{fewest}-{most}"
        fewest = most + 1
    return f"{fewest}+"


def group_scores(
    measures: Sequence[Measure], values: Mapping[str, Sequence[str]], references: Sequence[str], scoring: dict[str, Any]
) -> dict[str, dict[str, Scores]]:
    """The scores of each group of clips, by kind and by name of the group, the largest groups first.

    Args:
        measures: of all clips.
        values: kind of a group -> what the corpus says of each clip; a kind of which all clips say the same has no
            groups.
        references: of each clip.
        scoring: as for :func:`toolkit.scoring.metrics.add_up`.
    """
    named = {kind: [value or UNKNOWN for value in of_clips] for kind, of_clips in values.items()}
    named["length"] = [length_group(reference) for reference in references]
    found = {}
    for kind, groups in named.items():
        members: dict[str, list[int]] = {}
        for clip, group in enumerate(groups):
            members.setdefault(group, []).append(clip)
        if len(members) > 1:
            order = sorted(members, key=lambda group: (-len(members[group]), group))
            if kind == "length":
                order = sorted(members, key=lambda group: int(group.rstrip("+").partition("-")[0]))
            found[kind] = {
                group: add_up([part.of_clips(members[group]) for part in measures], **scoring) for group in order
            }
    return found
