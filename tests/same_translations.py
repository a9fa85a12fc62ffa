"""Comparison of two prediction files whose models are the same but whose processes are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.scoring.predictions import read_predictions

ROUNDING = 2e-4  # two steps of the last digit that a file keeps


def assert_same_translations(found: Path, expected: Path) -> None:
    """Texts are equal; scores of the search may differ by the rounding of another number of threads or addresses."""
    rows, wanted = read_predictions(found), read_predictions(expected)
    assert [replace(row, score=None) for row in rows] == [replace(row, score=None) for row in wanted], found.name
    assert [row.score for row in rows] == pytest.approx([row.score for row in wanted], rel=0, abs=ROUNDING), found.name
