"""A corpus and published backbones, shared by the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.vocabulary.backbones import KEPT
from tests.models.warm_start.makers import HANDS, corpus_of
from toolkit.corpus.packed import Corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return corpus_of(folder / "corpus", HANDS, KEPT)
