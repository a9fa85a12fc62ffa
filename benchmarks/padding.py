#!/usr/bin/env python
"""What few shapes cost in padding: batches padded to a ladder of lengths beside batches padded to their longest clip.

python benchmarks/padding.py                half a minute on one core
python benchmarks/padding.py --clips 4096   a smaller corpus alone; nothing is written

Writes benchmarks/results/padding.json. Lengths are as iSign's (log-normal, median 90 frames, 16 to 300), texts have a
token for every four frames on average; the pose encoder has two frames a position. Of each way it counts an epoch's
padding in percent of its frames, fillers included, the forward passes of a rank, and the shapes (clips, frames and
tokens of a micro-batch). ``points`` and ``text_points`` are the padding of the ladder less that of the longest, in
percent of frames and of target tokens. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from toolkit.batching.ladder import fitted_rungs, micro_batches_on_rungs, token_rungs, training_ladder
from toolkit.batching.lengths import rung_above
from toolkit.batching.order import Indices, epoch_order, micro_batches, micro_batches_by_frames
from toolkit.recipe.load import load_recipe

RESULTS = ROOT / "benchmarks" / "results" / "padding.json"
CORPORA = (4_096, 100_000)
STRIDE, MAX_TOKENS = 2, 128
# Clips of a step; clips and frames of a micro-batch, at most (None = no limit); ranks.
BATCHES = [(128, 16, None, 1), (128, 128, None, 1), (32, 8, None, 1), (128, 128, 9_600, 1), (128, 32, 2_400, 1)]
BATCHES += [(128, 16, None, 8), (128, 128, 2_400, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, metavar="N", help="one corpus of so many clips")
    clips = parser.parse_args().clips
    results: dict[str, Any] = {"fit_1m_clips_s": fit_seconds(1_000_000)}
    for number in [clips] if clips else CORPORA:
        frames, tokens = isign_like(number)
        rungs = fitted_rungs(frames, STRIDE)
        print(f"{number} clips: {', '.join(map(str, rungs))} frames")
        results[f"{number:,} clips"] = [row(frames, tokens, rungs, *batch) for batch in BATCHES]
        for line in results[f"{number:,} clips"]:
            print(json.dumps(line), flush=True)
    if clips is None:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def isign_like(clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and target tokens of each clip."""
    rng = np.random.default_rng(0)
    frames = rng.lognormal(np.log(90), 0.6, clips).clip(16, 300).astype(np.int64)
    return frames, (frames / 4 * rng.lognormal(0, 0.35, clips)).clip(4, MAX_TOKENS).astype(np.int64)


def fit_seconds(clips: int) -> float:
    """Seconds to find a run's ladder, augmented lengths included."""
    frames, _ = isign_like(clips)
    recipe = load_recipe("t5_small", [])
    before = time.perf_counter()
    training_ladder(frames, recipe)
    return round(time.perf_counter() - before, 3)


def row(
    frames: np.ndarray,
    tokens: np.ndarray,
    rungs: tuple[int, ...],
    batch: int,
    micro: int,
    budget: int | None,
    world_size: int,
) -> dict[str, Any]:
    """An epoch both ways."""
    figures: dict[str, Any] = {"batch": batch, "micro_batch": micro, "budget": budget or "none", "ranks": world_size}
    steps = epoch_order(frames, batch, 42, 0)
    texts = {}
    for way in ("longest", "ladder"):
        padded, text_places, passes, shapes = 0, 0, 0, set()
        for clips in steps:
            for rank in range(world_size):
                for share, length in shares(way, clips, frames, rungs, rank, world_size, micro, budget, batch):
                    longest = int(tokens[np.where(share < 0, ~share, share)].max())
                    longest = rung_above(token_rungs(MAX_TOKENS), longest) if way == "ladder" else longest
                    padded += len(share) * length
                    text_places += len(share) * longest
                    passes += rank == 0
                    shapes.add((len(share), length, longest))
        texts[way] = 100 * (1 - tokens.sum() / text_places)
        figures |= {
            f"{way}_padding": round(100 * (1 - frames.sum() / padded), 2),
            f"{way}_passes": passes,
            f"{way}_shapes": len(shapes),
        }
    points = figures["ladder_padding"] - figures["longest_padding"]
    return figures | {"points": round(points, 2), "text_points": round(texts["ladder"] - texts["longest"], 2)}


def shares(
    way: str,
    clips: Indices,
    frames: np.ndarray,
    rungs: tuple[int, ...],
    rank: int,
    world_size: int,
    micro: int,
    budget: int | None,
    batch: int,
) -> list[tuple[Indices, int]]:
    """A rank's micro-batches of a step and their padded frames."""
    if way == "ladder":
        return micro_batches_on_rungs(clips, frames, rungs, rank, world_size, micro, budget, batch)
    own = (
        micro_batches(clips, rank, world_size, micro)
        if budget is None
        else micro_batches_by_frames(clips, frames, rank, world_size, micro, budget)
    )
    return [(share, int(frames[np.where(share < 0, ~share, share)].max())) for share in own]


if __name__ == "__main__":
    main()
