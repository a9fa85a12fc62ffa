"""A resolved run, a small corpus of random motion, and one without motion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Clip, Corpus
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.resolve import ResolvedRun, resolve_named


def still_corpus(folder: Path, *texts: str) -> Corpus:
    """Write a corpus whose clips are four frames without motion, one for each text."""
    clips = [Clip(f"clip-{n}", text, np.zeros((4, 50, 3), np.float16)) for n, text in enumerate(texts)]
    return write_corpus(folder, {"train": clips}, load_landmark_set("hands_body_50"), 10.0, NORMALISATION)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Six clips to train, of four texts, and one to test."""
    rng = np.random.default_rng(0)
    landmark_set = load_landmark_set("hands_body_50")

    def clip(number: int, text: str) -> Clip:
        features = rng.normal(size=(8 + number, landmark_set.num_points, landmark_set.num_channels))
        return Clip(f"clip-{number}", text, features.astype(np.float16), gloss=text.upper())

    texts = ["sun", "moon", "sun", "star", "moon", "sky"]
    splits = {"train": [clip(i, text) for i, text in enumerate(texts)], "test": [clip(9, "rain")]}
    return write_corpus(tmp_path / "corpus", splits, landmark_set, 12.5, NORMALISATION)


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., ResolvedRun]:
    """Resolve the demo's recipe with overrides, into a run directory of the test's own."""

    def resolve(*overrides: str, **settings: Any) -> ResolvedRun:
        settings = {"world_size": 1, "has_gpu": False, **settings}
        return resolve_named("demo", [f"run.dir={tmp_path / 'run'}", *overrides], **settings)

    return resolve
