#!/usr/bin/env python
"""How fast features of another network are loaded into a batch, beside the speed of memory in the same run.

python benchmarks/features.py           half a minute on one core
python benchmarks/features.py --quick   fewer clips, to see that it runs; nothing is written

Writes benchmarks/results/features.json. Clips of 32 to 600 frames (log-normal, median 180, as at 25 frames a second)
have 768 float16 numbers a frame. Loading is what a loader process does: read the clips of a batch out of the memory map
and pad them. The speed of memory is that of a plain copy of as many bytes into new memory, out of an array as large.
Both take turns; the figures are medians over rounds of all batches. The map is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from toolkit.batching.collate import pad_video_features
from toolkit.batching.order import epoch_order
from toolkit.corpus.packed import Clip, Corpus, Metadata
from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import NO_LANDMARKS

RESULTS = ROOT / "benchmarks" / "results" / "features.json"
WIDTH, BATCH, ROUNDS = 768, 32, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = packed(Path(folder) / "corpus", 128 if quick else 1024)
        results = measure(corpus)
    print(json.dumps(results, indent=2))
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def packed(folder: Path, count: int) -> Corpus:
    """A corpus of features alone."""
    rng = np.random.default_rng(0)
    frames = rng.lognormal(np.log(180), 0.6, count).clip(32, 600).astype(int)
    noise = rng.normal(size=(1024, WIDTH)).astype(np.float16)

    def clip(number: int, length: int) -> Clip:
        values = noise[rng.integers(0, len(noise), length)]
        return Clip(f"clip-{number}", "text", np.empty((length, 0, 3), np.float16), video_features=values)

    (folder / "train").mkdir(parents=True)
    clips = [clip(number, int(length)) for number, length in enumerate(frames)]
    write_shard(folder / "train" / shard_name(0, 1), clips, 0, WIDTH)
    finish_split(folder / "train", 0, WIDTH)
    splits = {"train": {"clips": count, "frames": int(frames.sum())}}
    metadata = Metadata(NO_LANDMARKS.to_dict(), 12.5, NORMALISATION, splits=splits, num_features=WIDTH)
    finish_corpus(folder, metadata)
    return Corpus.open(folder)


def measure(corpus: Corpus) -> dict[str, Any]:
    """GB/s of loading and of memory, by turns, and the median of their ratios."""
    split = corpus.splits["train"]
    batches = [batch.tolist() for batch in epoch_order(split.frames, BATCH, 42, 0)]
    shapes = [(len(batch), int(split.frames[batch].max())) for batch in batches]
    ends = np.cumsum([clips * frames for clips, frames in shapes])
    source = np.ones((int(ends[-1]), WIDTH), np.float16)

    def load() -> None:
        for batch in batches:
            pad_video_features([split.clip(index).video_features for index in batch])

    def copy() -> None:
        for start, end in pairwise([0, *ends.tolist()]):
            torch.from_numpy(source[start:end].copy())

    load()
    copy()  # pages of the map, and memory of the allocator
    rounds = [(seconds_of(load), seconds_of(copy)) for _ in range(ROUNDS)]
    return {
        "loading_gb_per_s": round(source.nbytes / median(first for first, _ in rounds) / 1e9, 2),
        "memory_gb_per_s": round(source.nbytes / median(second for _, second in rounds) / 1e9, 2),
        "ratio": round(median(second / first for first, second in rounds), 3),
        "width": WIDTH,
        "clips": len(split),
        "gb_a_round": round(source.nbytes / 1e9, 2),
    }


def seconds_of(work: Callable[[], None]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
