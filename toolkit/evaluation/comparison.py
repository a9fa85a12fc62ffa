"""Two prediction files of the same clips, compared by a paired bootstrap test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.scoring.addends import frequent_words, measure
from toolkit.scoring.predictions import Prediction, read_predictions
from toolkit.scoring.resampling import Comparison, compare
from toolkit.scoring.table import comparison_table

SAME_CLIPS = "compare two files that evaluate.py wrote for the same split of the same corpus"


def compare_files(
    first: str | Path, second: str | Path, *, tokenize: str = "13a", lowercase: bool = False
) -> dict[str, Comparison]:
    """Paired bootstrap test between two prediction files of the same clips.

    Raises:
        UserError: a file is not one, or they are not about the same clips.
    """
    rows, others = _by_uid(first), _by_uid(second)
    lacking = [(uid, second) for uid in rows.keys() - others.keys()]
    lacking += [(uid, first) for uid in others.keys() - rows.keys()]
    if lacking:
        uid, path = lacking[0]
        raise UserError(f"{path} has no clip {uid!r} ({len(lacking)} such clips)", SAME_CLIPS)
    if not rows:
        raise UserError(f"{first} holds no predictions", SAME_CLIPS)
    changed = [uid for uid, row in rows.items() if row.reference != others[uid].reference]
    if changed:
        raise UserError(
            f"{first} and {second} have different references for clip {changed[0]!r} ({len(changed)} such clips)",
            SAME_CLIPS,
        )
    references = [row.reference for row in rows.values()]
    settings: dict[str, Any] = {
        "tokenize": tokenize,
        "lowercase": lowercase,
        "frequent_words": frequent_words(references, tokenize),
    }
    return compare(
        measure([row.hypothesis for row in rows.values()], references, **settings),
        measure([others[uid].hypothesis for uid in rows], references, **settings),
    )


def format_comparison(first: str | Path, second: str | Path, comparisons: dict[str, Comparison]) -> str:
    """The comparison as a table whose columns are called A and B."""
    return f"A  {first}\nB  {second}\n\n{comparison_table('A', 'B', comparisons)}"


def _by_uid(path: str | Path) -> dict[str, Prediction]:
    rows: dict[str, Prediction] = {}
    for row in read_predictions(path):
        if row.uid in rows:
            raise UserError(f"{path} has the clip {row.uid!r} more than once", "keep one row for each clip")
        rows[row.uid] = row
    return rows
