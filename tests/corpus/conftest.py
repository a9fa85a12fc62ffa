from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from toolkit.corpus.demo import DemoSizes, make_demo


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with ``table.csv`` (uid, text, split, language) and 24 real ``.pose`` files in ``poses/``."""
    return make_demo(tmp_path_factory.mktemp("demo") / "clips", DemoSizes(16, 2, 4, 2))


@pytest.fixture
def own_clips(clips: Path, tmp_path: Path) -> Path:
    """A copy of ``clips`` that a test may spoil."""
    return Path(shutil.copytree(clips, tmp_path / "clips"))


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def rows_of():
    return read_rows
