#!/usr/bin/env python
"""How fast features of another network are loaded into batches, beside the speed of memory in the same run.

python benchmarks/features.py           a minute on one core
python benchmarks/features.py --quick   fewer clips, to see that it runs; nothing is written

Writes benchmarks/results/features.json. Clips have 768 float16 numbers a frame and one length, row by row a longer one.
Loading is what a loader process does: read the clips of a batch, texts and all, out of the memory map and pad their
features. The speed of memory is that of the copies alone: the same clips, held in memory as arrays, each copied by one
assignment into a new batch, which is dropped before the next. Both take turns; a figure is the median over rounds of
all batches. The files are in the page cache. In the first epoch (``first_gb_per_s``) a process maps their pages
and looks each clip up; the ratio is that of the following ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from toolkit.batching.collate import pad_video_features
from toolkit.batching.order import epoch_order
from toolkit.corpus.packed import Clip, Corpus, Metadata, Split
from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import NO_LANDMARKS

RESULTS = ROOT / "benchmarks" / "results" / "features.json"
WIDTH, BATCH, ROUNDS = 768, 32, 15
LENGTHS, SIZE = (64, 128, 256, 512), 256 << 20  # frames of a clip; bytes of a corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows = []
    for frames in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            clips = (SIZE // 8 if quick else SIZE) // (2 * WIDTH * frames) // BATCH * BATCH
            rows.append(measure(packed(Path(folder) / "corpus", clips, frames), frames))
        print(json.dumps(rows[-1]), flush=True)
    if not quick:
        RESULTS.write_text(json.dumps({"by length": rows}, indent=2) + "\n", encoding="utf-8")


def packed(folder: Path, count: int, frames: int) -> Corpus:
    """A corpus of features alone."""
    noise = np.random.default_rng(0).normal(size=(frames + count, WIDTH)).astype(np.float16)
    (folder / "train").mkdir(parents=True)
    clips = [
        Clip(
            f"clip-{number}",
            "a text of some words",
            np.empty((frames, 0, 3), np.float16),
            video_features=noise[number : number + frames],
        )
        for number in range(count)
    ]
    write_shard(folder / "train" / shard_name(0, 1), clips, 0, WIDTH)
    finish_split(folder / "train", 0, WIDTH)
    splits = {"train": {"clips": count, "frames": count * frames}}
    metadata = Metadata(NO_LANDMARKS.to_dict(), 12.5, NORMALISATION, splits=splits, num_features=WIDTH)
    finish_corpus(folder, metadata)
    return Corpus.open(folder)


def measure(corpus: Corpus, frames: int) -> dict[str, Any]:
    """GB/s of loading and of memory, by turns, and the median of their ratios."""
    split = corpus.splits["train"]
    batches = epoch_order(split.frames, BATCH, 42, 0)
    held = [[np.array(split.clip(index).video_features) for index in batch] for batch in batches]
    size = len(split) * frames * WIDTH * 2

    def load(opened: Split) -> Callable[[], None]:
        def epoch() -> None:
            for batch in batches:
                pad_video_features(opened.read(batch).video_features)

        return epoch

    def copy() -> None:
        for clips in held:
            copied(clips, frames)

    first = median(seconds_of(load(Corpus.open(corpus.path).splits["train"])) for _ in range(ROUNDS))
    seconds_of(load(split))
    rounds = [(seconds_of(load(split)), seconds_of(copy)) for _ in range(ROUNDS)]
    return {
        "frames": frames,
        "clips": len(split),
        "first_gb_per_s": round(size / first / 1e9, 2),
        "loading_gb_per_s": round(size / median(first for first, _ in rounds) / 1e9, 2),
        "memory_gb_per_s": round(size / median(second for _, second in rounds) / 1e9, 2),
        "ratio": round(median(second / first for first, second in rounds), 3),
    }


def copied(clips: list[np.ndarray], frames: int) -> torch.Tensor:
    """Clips of this length as one batch."""
    batch = np.empty((len(clips), frames, WIDTH), np.float16)
    for row, values in enumerate(clips):
        batch[row] = values
    return torch.from_numpy(batch)


def seconds_of(work: Callable[[], None]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
