"""The data section of a recipe, for clips of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.recipe.schema import Data


def data_of(clips: Path, tmp_path: Path, **settings: Any) -> Data:
    """A table and a folder, prepared into a cache of the test's own."""
    given = {
        "table": str(clips / "table.csv"),
        "poses": str(clips / "poses"),
        "cache": str(tmp_path / "cache"),
        "workers": 1,
    }
    return Data(**(given | settings))
