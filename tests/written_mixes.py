"""Several small corpora of random motion, for tests of mixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Clip, Corpus
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set

Splits = dict[str, int]
SIZES: dict[str, Splits] = {
    "large": {"train": 40, "dev": 3, "test": 4},
    "small": {"train": 6, "dev": 2, "test": 2},
    "synthetic": {"train": 20},
}


def write_one(
    folder: Path, splits: Splits, *, seed: int = 0, landmarks: str = "hands_body_50", fps: float = 12.5, **known: str
) -> Corpus:
    """A corpus of clips of 5 to 40 frames, whose texts and uids begin with the folder's name."""
    rng, landmark_set = np.random.default_rng(seed), load_landmark_set(landmarks)

    def clip(split: str, number: int) -> Clip:
        size = (int(rng.integers(5, 41)), landmark_set.num_points, landmark_set.num_channels)
        name = f"{folder.name}-{split}-{number}"
        features = rng.normal(size=size).astype(np.float16)
        return Clip(name, f"{folder.name} says {split} number {number}", features, **known)

    clips = {split: [clip(split, number) for number in range(count)] for split, count in splits.items()}
    return write_corpus(folder, clips, landmark_set, fps, NORMALISATION)


def write_three(folder: Path) -> list[Path]:
    """The folders of three corpora; ``small`` has a language, and ``synthetic`` only training clips.

    One signer signs all clips of ``large`` and ``small``.
    """
    known = {"small": {"language": "gsg", "signer": "Ann"}, "large": {"signer": "Ann"}}
    return [
        write_one(folder / name, splits, seed=seed, **known.get(name, {})).path
        for seed, (name, splits) in enumerate(SIZES.items())
    ]
