#!/usr/bin/env python
"""What a step of T5-Base asks of a GPU and of its host: launches, waits and the host's time, counted without a GPU.

/path/to/python benchmarks/launches.py     about five minutes on two quiet cores; a Python with a CUDA build of torch

The pretended CUDA runtime (tests/pretended_cuda) takes the place of a GPU: torch, DeepSpeed, Inductor and CUDA graphs
are those of a GPU, kernels do nothing. So a step takes what its host needs for it. One rank's part of a step of 128
clips on eight GPUs: 16 clips, one forward pass, weights of published size. Ways of training are processes that take
turns of an epoch. Writes benchmarks/results/launches.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pretended import use_pretended_gpu
from sides import started, take_turn
from training_corpus import make_corpus, sentences

from toolkit.models.tokenizers import make_tokenizer

RESULTS = HERE / "results" / "launches.json"
CLIPS = 16  # of a step
STEPS = 32  # of a turn, an epoch
WARM = 2  # turns before the first that counts; they compile, and capture the graphs of an epoch
SETTINGS = [
    "model.from_scratch=true",
    f"training.global_batch_size={CLIPS}",
    f"training.micro_batch_size={CLIPS}",
    "training.workers=1",
    "deepspeed=zero0",
    "augmentation.speed=0",  # an epoch has the shapes of the others
]
SIDES: dict[str, list[str]] = {
    "ours_graphs": ["ours", "training.compile=graphs"],
    "ours_compiled": ["ours", "training.compile=true"],
    "ours_as_written": ["ours", "training.compile=false"],
    "bare": ["bare", "training.compile=false"],
    "plain": ["plain"],
    "hf": ["hf", "deepspeed=zero2"],
}
KERNELS = ("kernels", "blas", "dnn", "triton", "nccl", "graph_launches")  # each is launched by one call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each side (default 3)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default %(default)s")
    arguments = parser.parse_args()
    torch = use_pretended_gpu()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = make_corpus(folder / "corpus", CLIPS * STEPS).splits["train"].texts
        make_tokenizer("train", [*texts, *sentences(64)]).save_pretrained(folder / "tokenizer")
        row = measure(folder, arguments.rounds)
    row |= {"torch": torch, "processor": platform.processor() or platform.machine()}
    arguments.results.write_text(json.dumps({"t5_base_16": row}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(row))


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """All sides of one step, in turns."""
    milliseconds: dict[str, list[float]] = {side: [] for side in SIDES}
    counted: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        processes, first = {}, {}
        for side, (way, *more) in SIDES.items():
            settings = [*SETTINGS, f"model.tokenizer={folder / 'tokenizer'}", *more]
            script = [str(HERE / "training_side.py"), "--recipe", "t5_base", way, str(folder), *settings]
            processes[side] = stack.enter_context(started(["-m", "tests.pretended_cuda", sys.executable, *script]))
            first[side] = take_turn(processes[side], STEPS)["seconds"]
            for _ in range(WARM - 1):
                take_turn(processes[side], STEPS)
        for _ in range(rounds):
            for side, process in processes.items():
                turn = take_turn(process, f"launches {STEPS}")
                milliseconds[side].append(1000 * turn["seconds"] / STEPS)
                calls: dict[str, int] = turn["calls"]
                counted[side] = {
                    "launches": round(sum(calls[name] for name in KERNELS) / STEPS),
                    "waits": round(calls["waits"] / STEPS, 1),
                }
    taken = {side: median(times) for side, times in milliseconds.items()}
    return {
        "clips_a_step": CLIPS,
        "hf_by_graphs": round(taken["hf"] / taken["ours_graphs"], 2),
        "hf_by_as_written": round(taken["hf"] / taken["ours_as_written"], 2),
        "sides": {
            side: {
                "host_ms_a_step": round(taken[side], 1),
                **counted[side],
                "first_epoch_seconds": round(first[side], 1),
            }
            for side in SIDES
        },
    }


if __name__ == "__main__":
    main()
