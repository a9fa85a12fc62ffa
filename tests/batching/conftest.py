"""A small packed corpus and a resolved run, made with the toolkit's own writers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from tests.written_corpora import write_corpus
from toolkit.batching.collate import Batch
from toolkit.batching.loader import train_batches
from toolkit.corpus.packed import Clip, Corpus
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Recipe


def make_clip(index: int, frames: int, num_points: int = 50) -> Clip:
    """A clip of random coordinates that depend on its index; one landmark in five is missing."""
    rng = np.random.default_rng(index)
    features = rng.normal(size=(frames, num_points, 3)).astype(np.float16)
    features[rng.random((frames, num_points)) < 0.2] = np.nan
    return Clip(uid=f"clip{index:03d}", text=f"text number {index}", features=features)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    frames = np.random.default_rng(0).integers(5, 60, size=45)
    clips = [make_clip(index, int(count)) for index, count in enumerate(frames)]
    return write_corpus(
        tmp_path_factory.mktemp("data") / "corpus", {"train": clips}, load_landmark_set("hands_body_50"), fps=12.5
    )


@pytest.fixture(scope="session")
def known_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Clips of which something is known besides their poses."""
    clips = [
        dataclasses.replace(make_clip(index, 8 + index), language=f"language{index}", context=f"context{index}")
        for index in range(45)
    ]
    folder = tmp_path_factory.mktemp("data") / "known"
    return write_corpus(folder, {"train": clips}, load_landmark_set("hands_body_50"), fps=12.5)


@pytest.fixture(scope="session")
def wordy_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Clips whose texts are so long that one batch fills the pipe between a worker and its parent."""
    clips = [dataclasses.replace(make_clip(index, 30), text="word " * 50_000) for index in range(45)]
    folder = tmp_path_factory.mktemp("data") / "wordy"
    return write_corpus(folder, {"train": clips}, load_landmark_set("hands_body_50"), fps=12.5)


@pytest.fixture
def resolve() -> Callable[..., ResolvedRun]:
    """Batch arithmetic for a number of ranks, with settings by section."""

    def make(
        world_size: int = 1, micro: int = 4, accumulation: int = 2, *, padding: str = "longest", **sections: dict
    ) -> ResolvedRun:
        training = {
            "global_batch_size": world_size * micro * accumulation,
            "micro_batch_size": micro,
            "workers": 0,
            **sections.pop("training", {}),
        }
        recipe = Recipe.model_validate(
            {"name": "test", "model": {"backbone": "t5_small"}, "training": training, **sections}
        )
        return ResolvedRun(recipe, {}, world_size, micro, accumulation, Path("unused"), padding=padding)

    return make


@pytest.fixture(scope="module")
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@pytest.fixture
def train(corpus: Corpus, tokenizer: ByT5Tokenizer) -> Callable[..., list[list[Batch]]]:
    """All steps of an epoch of one rank."""

    def run(resolved: ResolvedRun, *, epoch: int = 0, start_step: int = 0, rank: int = 0) -> list[list[Batch]]:
        stream = train_batches(
            corpus.splits["train"],
            tokenizer,
            resolved,
            landmark_set=corpus.landmark_set,
            epoch=epoch,
            start_step=start_step,
            rank=rank,
        )
        return list(stream)

    return run
