"""Prediction files: CSV with one row a clip, written atomically and read back exactly.

NUL bytes, which many CSV readers refuse, are written ``\\0``, and a backslash ``\\\\``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from toolkit.errors import UserError
from toolkit.scoring.metrics import sentence_chrf


@dataclass(frozen=True)
class Prediction:
    """One clip's translation."""

    uid: str  # the clip
    reference: str  # the clip's text
    hypothesis: str  # the model's translation
    score: float | None = None  # the search's: log-probability over length penalty
    chrf: float | None = None  # chrF++ of this pair alone, 0..100, where it was computed


COLUMNS = tuple(item.name for item in fields(Prediction))
_TEXT_COLUMNS = COLUMNS[:3]
REMEDY = "give a CSV file that evaluate.py wrote, or one like it"


def make_predictions(
    uids: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    scores: Sequence[float | None] | None = None,
) -> list[Prediction]:
    """Put the columns together and add each pair's own chrF++.

    Raises:
        ValueError: the columns differ in length.
    """
    chrf = sentence_chrf(hypotheses, references)
    columns = (uids, references, hypotheses, scores if scores is not None else [None] * len(uids), chrf)
    return [Prediction(*row) for row in zip(*columns, strict=True)]


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write a prediction file, under a temporary name until it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            # Quoting every text keeps a lone carriage return inside its field on all versions of Python.
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(COLUMNS)
            for prediction in predictions:
                writer.writerow([_escape(cell) if isinstance(cell, str) else cell for cell in astuple(prediction)])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a prediction file, also one made elsewhere: ``uid``, ``reference`` and ``hypothesis`` are enough.

    Raises:
        UserError: there is no such file, or it is not a prediction file.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in _TEXT_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}", f"begin the file with {','.join(_TEXT_COLUMNS)}"
                )
            return [_parse(row, f"{path}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise UserError(f"the prediction file {path} cannot be read: {error.strerror}", REMEDY) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}", REMEDY) from error


def _parse(row: dict[str, str | None], where: str) -> Prediction:
    texts = [text for name in _TEXT_COLUMNS if (text := row[name]) is not None]
    if len(texts) < len(_TEXT_COLUMNS):
        raise UserError(f"{where}: the row is incomplete", f"give every row {', '.join(_TEXT_COLUMNS)}")
    try:
        score, chrf = (float(cell) if (cell := row.get(name)) else None for name in ("score", "chrf"))
    except ValueError as error:
        raise UserError(f"{where}: {error}", "write numbers as score and chrf, or leave them empty") from error
    uid, reference, hypothesis = map(_unescape, texts)
    return Prediction(uid, reference, hypothesis, score, chrf)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\0", "\\0")


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\0])", lambda match: "\0" if match[1] == "0" else "\\", text)
