#!/usr/bin/env python
"""What absolute positions are worth to a decoder that reads poses, and the kinds of pose encoder side by side.

python benchmarks/positions.py                    both parts; under ten minutes on two quiet cores
python benchmarks/positions.py --only cost        one part; the other stays as it was
python benchmarks/positions.py --steps 50         whether it works at all

Writes benchmarks/results/positions.json and docs/pictures/positions.png.

``learning``: the demo recipe on the demo corpus' single words, so many steps each, one seed, `launch/train.py` with one
thread a run. The encoder learns the letters by CTC, as in the demo, but the words are written by the decoder alone: its
cross-attention has to find out which letter is next, and that is where positions count. (Without CTC no encoder knows a
letter after so few steps, and there is nothing to compare.) Reported are the decoder's loss in nats per byte over the
last tenth of the steps, and the character and word error rates on the held-out words of the test split.

``cost``: milliseconds of one clip's forward and backward pass through each encoder with its default sizes, 150 frames,
one thread; the kinds take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import ensure_corpus
from toolkit.models.encoders import KINDS, PoseEncoder, make_pose_encoder
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.load import load_recipe
from toolkit.recipe.sections import model as sections

RESULTS = ROOT / "benchmarks" / "results" / "positions.json"
PICTURE = ROOT / "docs" / "pictures" / "positions.png"
LONGEST_WORD = 8  # letters; phrases take longer to learn than this benchmark may
# The switch both ways where the encoder is the demo's, every other kind as a recipe would have it.
CELLS = [("conv", True), ("conv", False), ("linear", True), ("conformer", True), ("stgcn", True)]
SETTINGS = [
    "training.epochs=999",  # the steps end it
    "training.micro_batch_size=16",  # all cells alike
    "training.eval_every=999",
    "training.save_every=99999",
    "evaluation.ctc_weight=0",  # the decoder alone
    "evaluation.select_by=cer",
]
LANDMARK_SETS = ("hands_body_50", "holistic_178")
CLIPS, FRAMES, WIDTH, ROUNDS = 4, 150, 512, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("learning", "cost"), help="one part")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="optimizer steps of a run (default 600)")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["machine"] = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    if arguments.only != "learning":
        results["cost"] = cost()
    if arguments.only != "cost":
        results["learning"] = learning(arguments.steps)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results, PICTURE)


def learning(steps: int) -> dict[str, Any]:
    """Train every cell, as many at a time as there are cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = single_words(folder / "corpus")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(lambda cell: train(*cell, corpus=corpus, folder=folder, steps=steps), CELLS))
        clips = {split: len(of_split) for split, of_split in corpus.splits.items()}
    return {"steps": steps, "clips": clips, "longest_word": LONGEST_WORD, "rows": rows}


def single_words(folder: Path) -> Corpus:
    """The demo corpus without phrases and long words."""
    demo = Corpus.open(ensure_corpus(load_recipe("demo").data))
    splits = {
        name: [clip for clip in demo.splits[name] if " " not in clip.text and len(clip.text) <= LONGEST_WORD]
        for name in ("train", "test")
    }
    return write_corpus(folder, splits, demo.landmark_set, demo.metadata.fps, demo.metadata.normalisation)


def train(kind: str, positions: bool, *, corpus: Corpus, folder: Path, steps: int) -> dict[str, Any]:
    """One run of ``launch/train.py``."""
    run_dir = folder / f"{kind}_{positions}"
    command = [
        sys.executable, str(ROOT / "launch" / "train.py"), "--recipe", "demo", "--json", *SETTINGS,
        f"data.corpus={corpus.path}", f"run.dir={run_dir}", f"training.max_steps={steps}",
        f"model.pose_encoder={kind}", f"model.pose_encoder.positions={str(positions).lower()}",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    last = losses[-max(1, len(losses) // 10) :]
    row = {
        "encoder": kind,
        "positions": positions,
        "loss": round(sum(last) / len(last), 4),
        "cer": round(summary["scores"]["cer"], 4),
        "wer": round(summary["scores"]["wer"], 4),
        "training_seconds": summary["training_seconds"],
        "wall_seconds": round(time.perf_counter() - start, 1),
        "losses": [round(loss, 4) for loss in losses[:: max(1, len(losses) // 60)]],
    }
    print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
    return row


def cost() -> list[dict[str, Any]]:
    """A row for each kind and landmark set."""
    torch.set_num_threads(1)
    rows = []
    for name in LANDMARK_SETS:
        landmarks = load_landmark_set(name)
        shape = (CLIPS, FRAMES, landmarks.num_points)
        batch = torch.randn(*shape, landmarks.num_channels), torch.rand(*shape) < 0.7, torch.ones(shape[:2]).bool()
        encoders = {
            kind: make_pose_encoder(
                sections.PoseEncoder.model_validate({"kind": kind}).model_dump(),
                num_points=landmarks.num_points,
                num_channels=landmarks.num_channels,
                width=WIDTH,
                landmark_set=landmarks,
            )
            for kind in KINDS
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in encoders}
        for number in range(ROUNDS + 1):
            for kind, encoder in encoders.items():
                elapsed = _forward_and_backward(encoder, batch)
                if number:  # the first finds cold caches
                    seconds[kind].append(elapsed)
        for kind, encoder in encoders.items():
            rows.append(
                {
                    "encoder": kind,
                    "landmarks": name,
                    "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
                    "positions_of_150_frames": encoder(*batch)[0].shape[1],
                    "ms_per_clip": round(1000 * median(seconds[kind]) / CLIPS, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _forward_and_backward(encoder: PoseEncoder, batch: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    encoder(*batch)[0].square().mean().backward()
    return time.perf_counter() - start


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss curves, error rates and costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, errors, costs) = pyplot.subplots(1, 3, figsize=(12, 3.8))
    colours = dict(zip(KINDS, ("#7a8699", "#2563a8", "#c2571a", "#2e8b57"), strict=True))
    learnt = results.get("learning", {"rows": [], "steps": 1})
    labels = [row["encoder"] + ("" if row["positions"] else "\nno positions") for row in learnt["rows"]]
    for row, label in zip(learnt["rows"], labels, strict=True):
        steps = [learnt["steps"] * (place + 1) / len(row["losses"]) for place in range(len(row["losses"]))]
        style = "-" if row["positions"] else "--"
        curves.plot(steps, row["losses"], style, color=colours[row["encoder"]], label=label.replace("\n", ", "))
    curves.set(title="Loss of the decoder", xlabel="optimizer steps", ylabel="nats per byte", ylim=(0, None))
    curves.legend(fontsize=8, frameon=False)
    bars = errors.bar(
        labels,
        [row["cer"] for row in learnt["rows"]],
        color=[colours[row["encoder"]] for row in learnt["rows"]],
        hatch=["" if row["positions"] else "//" for row in learnt["rows"]],
        edgecolor="white",
    )
    errors.bar_label(bars, fmt="%.2f", fontsize=8)
    errors.set(title=f"Character error rate after {learnt['steps']} steps")
    errors.tick_params(axis="x", labelsize=8)
    offset = 0.4
    for number, name in enumerate(LANDMARK_SETS):
        rows = [row for row in results.get("cost", []) if row["landmarks"] == name]
        places = [place + number * offset for place in range(len(rows))]
        marks = costs.bar(
            places,
            [row["ms_per_clip"] for row in rows],
            offset,
            label=name,
            color=[colours[row["encoder"]] for row in rows],
            alpha=1 - 0.45 * number,
        )
        costs.bar_label(marks, fmt="%.0f", fontsize=8)
        costs.set_xticks([place + offset / 2 for place in range(len(rows))], [row["encoder"] for row in rows])
    costs.set(title="ms per clip of 150 frames, forward + backward\n(dark 50 landmarks, light 178)")
    for axis in (curves, errors, costs):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
