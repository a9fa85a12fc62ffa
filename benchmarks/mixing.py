#!/usr/bin/env python
"""What a mix of corpora costs: opening and ordering it, its padding, and the speed of its loader and of training.

python benchmarks/mixing.py              some ten minutes on one core
python benchmarks/mixing.py --training   only the speed of training, which replaces that of the last results
python benchmarks/mixing.py --clips 5000 smaller corpora to open; nothing is written

Writes benchmarks/results/mixing.json. Lengths are as iSign's (log-normal, median 90 frames, 16 to 300). Ten corpora of
100,000 clips each are opened, and the first epoch and one in the middle of the run are ordered, weights changing. Then
four corpora stand beside one with as many clips: padding of an epoch, and clips that the loader of one process gives in
a second of processor time, both sides in turn. ``drawn`` is how far the counts of an epoch are from its weights.
Whole training is that of two processes with a tiny model, which take turns of an epoch of the same clips; they load
them in the training process, so that nothing of it is hidden. Its ratio is the median over pairs of turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from sides import started, turns_of
from transformers import ByT5Tokenizer
from turns import answer

from toolkit.batching.epochs import mixture_of
from toolkit.batching.loader import train_batches
from toolkit.batching.order import epoch_order, micro_batches
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.corpus.packed import Clip, Corpus, Metadata
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
SIDES = ("one", "four")
SHARD = 10_000  # clips of a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, metavar="N", help="of each of the corpora that are opened")
    parser.add_argument("--training", action="store_true", help="measure only the speed of training")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        train_in_turns(arguments.folder, arguments.side)
        return
    clips = arguments.clips
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sides(folder)
        if arguments.training:
            results = json.loads(RESULTS.read_text(encoding="utf-8"))
        else:
            results = {**opening(folder / "many", clips or CLIPS), **beside(folder)}
        results |= training(folder)
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


def write_sides(folder: Path) -> None:
    """Four corpora, and one with all of their clips."""
    four = [write(folder / f"four{number}", BESIDE_CLIPS, points=50, seed=number) for number in range(1, BESIDE + 1)]
    (folder / "one").mkdir()
    (folder / "one" / "train").mkdir()
    sums = {"clips": 0, "frames": 0}
    for number, path in enumerate(four):
        (shard,) = (path / "train").glob("*.arrow")
        shutil.copy(shard, folder / "one" / "train" / shard_name(number, BESIDE))
        metadata = Corpus.open(path).metadata
        sums = {what: value + metadata.splits["train"][what] for what, value in sums.items()}
    finish_corpus(folder / "one", replace(metadata, splits={"train": sums}))


def side_recipe(folder: Path, side: str) -> Recipe:
    """One corpus, or four that are drawn alike."""
    if side == "one":
        return recipe_of([folder / "one"], [None])
    return recipe_of([folder / f"four{number}" for number in range(1, BESIDE + 1)], [1.0] * BESIDE)


def beside(folder: Path) -> dict[str, Any]:
    """Four corpora, drawn alike, beside one with their clips."""
    sides = {side: side_recipe(folder, side) for side in SIDES}
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


def training(folder: Path) -> dict[str, Any]:
    """Clips a second of whole training, in turns of an epoch."""
    steps = -(-BESIDE * BESIDE_CLIPS // 128)
    with ExitStack() as stack:
        commands = {side: [__file__, "--side", side, "--folder", str(folder)] for side in SIDES}
        processes = {side: stack.enter_context(started(command)) for side, command in commands.items()}
        taken = turns_of(processes, dict.fromkeys(SIDES, steps), TURNS)
    turns = {side: [turn["clips"] / turn["seconds"] for turn in of_side] for side, of_side in taken.items()}
    ratios = [four / one for one, four in zip(turns["one"], turns["four"], strict=True)]
    return {
        "trained clips/s": {side: round(float(np.median(values)), 1) for side, values in turns.items()},
        "trained clips/s of four over one": {
            "value": round(float(np.median(ratios)), 3),
            "each": [round(ratio, 3) for ratio in ratios],
            "target": "at least 0.98",
        },
    }


def train_in_turns(folder: Path, side: str) -> None:
    """One side: the toolkit's own loop, loading and all."""
    from training_side import turns_of_ours

    more = ["model.tiny=true", "model.pose_encoder.hidden=64", "model.from_scratch=true", "model.tokenizer=bytes"]
    more += ["ds.bf16.enabled=false", f"run.dir={folder / f'run_{side}'}"]
    recipe = side_recipe(folder, side)
    for _, _, clips, seconds in turns_of_ours(resolved_of(recipe, *more), open_corpora(recipe.data), loaded=False):
        answer(clips, seconds)


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


def resolved_of(recipe: Recipe, *more: str) -> ResolvedRun:
    parts = [part.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for part in recipe.data.corpora]
    settings = [f"data.corpora={json.dumps(parts)}", "training.workers=0", "training.micro_batch_size=16"]
    return resolve_named("t5_small", [*settings, "training.global_batch_size=128", *more], 1, has_gpu=False)


if __name__ == "__main__":
    main()
