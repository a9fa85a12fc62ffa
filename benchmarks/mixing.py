#!/usr/bin/env python
"""What a mix of corpora costs: opening and ordering it, its padding, and the speed of its loader.

python benchmarks/mixing.py              some minutes on one core
python benchmarks/mixing.py --clips 5000 smaller corpora to open; nothing is written

Writes benchmarks/results/mixing.json. Lengths are as iSign's (log-normal, median 90 frames, 16 to 300). Ten corpora of
100,000 clips each are opened, and the first epoch and one in the middle of the run are ordered, weights changing. Then
four corpora stand beside one with as many clips: padding of an epoch, and clips that the loader of one process gives in
a second of processor time, both sides in turn. ``drawn`` is how far the counts of an epoch are from its weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from transformers import ByT5Tokenizer

from toolkit.batching.epochs import mixture_of
from toolkit.batching.loader import train_batches
from toolkit.batching.order import epoch_order, micro_batches
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.corpus.packed import Clip, Metadata
from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
from toolkit.files import write_text_atomically
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.recipe.schema import Recipe

RESULTS = ROOT / "benchmarks" / "results" / "mixing.json"
CLIPS, CORPORA = 100_000, 10
BESIDE, BESIDE_CLIPS, TURNS = 4, 500, 5
SHARD = 10_000  # clips of a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, metavar="N", help="of each of the corpora that are opened")
    clips = parser.parse_args().clips
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results = {**opening(folder / "many", clips or CLIPS), **beside(folder)}
    print(json.dumps(results, indent=2))
    if clips is None:
        write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")


def write(folder: Path, clips: int, points: int, seed: int = 0, scale: float = 1.0) -> Path:
    """A corpus of clips of ``points`` landmarks each, ``scale`` times as long as iSign's."""
    full = load_landmark_set("hands_body_50")
    content = full.to_dict() | {"points": full.points[:points]}
    rng = np.random.default_rng(seed)
    frames = (rng.lognormal(np.log(90), 0.6, clips).clip(16, 300) * scale).astype(int).clip(1)
    (folder / "train").mkdir(parents=True)
    zeros = rng.normal(size=(int(frames.max()), points, 3)).astype(np.float16)
    starts = range(0, clips, SHARD)
    for number, start in enumerate(starts):
        each = [Clip(f"{seed}-{i}", f"text {i}", zeros[: frames[i]]) for i in range(start, min(start + SHARD, clips))]
        write_shard(folder / "train" / shard_name(number, len(starts)), each, points * 3)
    finish_split(folder / "train", points * 3)
    sums = {"train": {"clips": clips, "frames": int(frames.sum())}}
    finish_corpus(folder, Metadata(content, 12.5, NORMALISATION, splits=sums))
    return folder


def recipe_of(folders: list[Path], weights: list[Any]) -> Recipe:
    parts = [
        {"corpus": str(path), **({} if weight is None else {"weight": weight})}
        for path, weight in zip(folders, weights, strict=True)
    ]
    return load_recipe("t5_small", [f"data.corpora={json.dumps(parts)}", "training.global_batch_size=128"])


def opening(folder: Path, clips: int) -> dict[str, Any]:
    """Seconds until the clips of an epoch are in order; the features are short, for they are not read."""
    first = write(folder / "0", clips, points=2, scale=0.05)
    folders = [first, *(shutil.copytree(first, folder / str(number)) for number in range(1, CORPORA))]
    recipe = recipe_of(folders, [1.0, *[[1.0, number / 4] for number in range(1, CORPORA)]])
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        split = open_corpora(recipe.data).splits["train"]
        mixture = mixture_of(split, recipe)
        for epoch in (0, 10):
            drawn = mixture.epoch(epoch)
            epoch_order(split.frames[drawn.clips], 128, 42, epoch)
        seconds.append(time.perf_counter() - started)
    counts = np.diff([mixture.drawn_before(10), mixture.drawn_before(11)], axis=0)[0]
    off = np.abs(counts / (mixture.epoch_clips * np.array(mixture.shares(10))) - 1).max()
    return {
        f"opening and ordering {CORPORA} corpora of {clips:,} clips, s": {
            "value": round(min(seconds), 2),
            "target": "at most 3",
        },
        "drawn, percent off the weights": {"value": round(100 * float(off), 4), "target": "at most 1"},
    }


def beside(folder: Path) -> dict[str, Any]:
    """Four corpora, drawn alike, beside one with as many clips."""
    one = write(folder / "one", BESIDE * BESIDE_CLIPS, points=50)
    four = [write(folder / f"four{number}", BESIDE_CLIPS, points=50, seed=number) for number in range(1, BESIDE + 1)]
    sides = {"one": recipe_of([one], [None]), "four": recipe_of(four, [1.0, 1.0, 1.0, 1.0])}
    padding = {name: padding_of(recipe) for name, recipe in sides.items()}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS):
        for name in sorted(sides, reverse=bool(turn % 2)):
            speeds[name].append(clips_per_second(sides[name], turn))
    speed = {name: float(np.median(values)) for name, values in speeds.items()}
    return {
        "padding, percent": {name: round(value, 2) for name, value in padding.items()},
        "padding of four less that of one, points": {
            "value": round(padding["four"] - padding["one"], 2),
            "target": "at most 1",
        },
        "loaded clips/s": {name: round(value) for name, value in speed.items()},
        "loaded clips/s of four over one": {
            "value": round(speed["four"] / speed["one"], 3),
            "target": "at least 0.98",
        },
    }


def padding_of(recipe: Recipe) -> float:
    """Percent of the frames of an epoch, in micro-batches of 16."""
    split = open_corpora(recipe.data).splits["train"]
    frames = split.frames[mixture_of(split, recipe).epoch(0).clips]
    shares = [share for batch in epoch_order(frames, 128, 42, 0) for share in micro_batches(batch, 0, 1, 16)]
    return 100 * float(1 - frames.sum() / sum(len(share) * int(frames[share].max()) for share in shares))


def clips_per_second(recipe: Recipe, epoch: int) -> float:
    """What the loader gives in this process."""
    resolved = resolved_of(recipe)
    corpus = open_corpora(recipe.data)
    batches = train_batches(
        corpus.splits["train"], ByT5Tokenizer(), resolved, landmark_set=corpus.landmark_set, epoch=epoch
    )
    started, clips = time.process_time(), 0
    for step in batches:
        clips += sum(batch.num_clips for batch in step)
    return clips / (time.process_time() - started)


def resolved_of(recipe: Recipe) -> ResolvedRun:
    parts = [part.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for part in recipe.data.corpora]
    settings = [f"data.corpora={json.dumps(parts)}", "training.workers=0", "training.micro_batch_size=16"]
    return resolve_named("t5_small", [*settings, "training.global_batch_size=128"], 1, has_gpu=False)


if __name__ == "__main__":
    main()
