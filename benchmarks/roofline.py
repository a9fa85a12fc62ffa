#!/usr/bin/env python
"""What the kernels of an optimizer step compute and move, and what an H100 and an H200 need for it at least.

/path/to/python benchmarks/roofline.py                 about 20 minutes on two cores; a Python with a CUDA torch
/path/to/python benchmarks/roofline.py --only t5_base  one recipe; the others stay as they were
/path/to/python benchmarks/roofline.py --only t5_base --sides ours_compiled --kernels 60  one side, and its kernels

Arithmetic, not a measurement: no kernel takes less than its FLOPs at the chip's peak, its bytes at the bandwidth of its
memory, or the time of the smallest kernel (benchmarks/traffic.py has the constants). Kernels are those that torch,
DeepSpeed and Inductor call on the pretended CUDA runtime (tests/pretended_cuda), at full size. Ways of training and
their settings are those of gpu.py, which measures on a GPU. Writes benchmarks/results/roofline.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_rows import ROWS
from gpu_training import Training
from pretended import use_pretended_gpu
from sides import started, take_turn
from traffic import BANDWIDTH, FLOPS, SHORTEST
from training_corpus import make_corpus

from toolkit.models.tokenizers import make_tokenizer
from toolkit.recipe.model_cards import load_model_yaml

RESULTS = HERE / "results" / "roofline.json"
CLIPS = 128  # of a step
STEPS = 4  # of a turn, an epoch: steps are sorted by length
SHOWN = 12  # of the kernels that take longest
ROWS_OF = {  # recipe -> rows of gpu.py
    "t5_small": ("t5_small_128", "t5_small_128_loops"),
    "t5_base": ("t5_base_128", "t5_base_128_loops"),
    "t5_large": ("t5_large", "t5_large_loops", "t5_large_peers"),
    "t5_3b_lora": ("t5_3b_lora", "t5_3b_lora_loops", "t5_3b_lora_peers"),
}
SAME = ["augmentation.speed=0", "training.workers=1"]  # epochs with the shapes of the one that has compiled
PEAK = FLOPS[max(FLOPS, key=lambda dtype: FLOPS[dtype])]


class Side(NamedTuple):
    way: str  # of training_side.py
    settings: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS_OF), metavar="RECIPE", default=list(ROWS_OF))
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="some of the ways of training")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help="other settings; writes no results")
    parser.add_argument("--kernels", type=int, metavar="N", default=0, help="print so many of each side's kernels")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the side that runs, too
    torch = use_pretended_gpu()
    for recipe in arguments.only:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), recipe)
            for side, (way, settings) in sides_of(recipe).items():
                if arguments.sides and side not in arguments.sides:
                    continue
                traffic = count(Path(name), recipe, way, (*settings, *arguments.set))
                print(recipe, side, json.dumps(figures_of(traffic)), flush=True)
                for kernel in largest(traffic["rows"], arguments.kernels).values():
                    print("   ", json.dumps(kernel))
                if not arguments.set:
                    write(arguments.results, recipe, side, traffic, torch)


def sides_of(recipe: str) -> dict[str, Side]:
    """Ways of training of gpu.py's rows; instead of graphs, whose replays are one launch, layers as they are written.

    The bare loop gets the compiled layers that ours has.
    """
    by_name = {row.name: row.measure for row in ROWS}
    found: dict[str, Side] = {}
    for row in (by_name[name] for name in ROWS_OF[recipe]):
        assert isinstance(row, Training)
        for name, (way, *settings) in row.sides.items():
            if name == "ours":
                found["ours_compiled"] = Side(way, (*settings, "training.compile=true"))
                found["ours_as_written"] = Side(way, (*settings, "training.compile=false"))
            elif name == "bare":
                found["bare_compiled"] = Side(way, (*settings, "training.compile=true"))
            elif name != "ours_graphs":
                found[name] = Side(way, tuple(settings))
    return found


def prepare(folder: Path, recipe: str) -> None:
    """An epoch of clips as long as iSign's, and a tokenizer with as many tokens as the published one's table has."""
    texts = make_corpus(folder / "corpus", CLIPS * STEPS).splits["train"].texts
    tokenizer = make_tokenizer("train", texts)
    rows = load_model_yaml(recipe.removesuffix("_lora")).config["vocab_size"]
    tokenizer.add_tokens([f"<unused_{number}>" for number in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(folder / "tokenizer")


def count(folder: Path, recipe: str, way: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """What the kernels of a step do: the mean of an epoch, after steps that have compiled and made all states."""
    training = Training(recipe, CLIPS, 0.0, {"": (way, *settings, *SAME)})
    script, *words = training.commands(folder, toy=False)[""]
    script = str(HERE / "traffic_side.py")
    with started(["-m", "tests.pretended_cuda", sys.executable, script, *words]) as process:
        take_turn(process, 1 if way == "hf" else STEPS)  # the epochs of the others have the same batches
        traffic = take_turn(process, f"traffic {STEPS}")
    if warning := traffic.get("warning"):  # as of layers that could not be compiled
        sys.exit(f"error: {recipe}, {way} with {' '.join(settings)}: {warning}")
    for row in traffic["rows"]:
        for key in row.keys() - {"place", "kernel"}:
            row[key] /= STEPS
    traffic["model_flops"] /= STEPS
    return traffic


def figures_of(traffic: dict[str, Any]) -> dict[str, float]:
    """Of a step: FLOPs, bytes, kernels, and of each chip the least time and the largest MFU."""
    rows = traffic["rows"]
    total = {key: sum(row[key] for row in rows) for key in ("calls", "flops", "bytes")}
    seconds = {chip: sum(row[f"seconds_{chip}"] for row in rows) for chip in BANDWIDTH}
    return {
        "tflop": round(total["flops"] / 1e12, 2),
        "gb": round(total["bytes"] / 1e9, 2),
        "kernels": round(total["calls"]),
        **{f"ms_{chip}": round(1000 * taken, 2) for chip, taken in seconds.items()},
        **{f"mfu_{chip}": round(traffic["model_flops"] / taken / PEAK, 3) for chip, taken in seconds.items()},
    }


def largest(rows: list[dict[str, Any]], number: int) -> dict[str, dict[str, Any]]:
    """Those that take an H100 longest, all calls at one place together."""
    ranked = sorted(rows, key=lambda row: row["seconds_h100"], reverse=True)
    return {
        str(place): {
            "kernel": row["kernel"],
            "called in": row["place"],
            "calls": round(row["calls"]),
            "gflop": round(row["flops"] / 1e9, 1),
            "mb": round(row["bytes"] / 1e6, 1),
            "us_h100": round(row["seconds_h100"] * 1e6),
        }
        for place, row in enumerate(ranked[:number], start=1)
    }


def write(path: Path, recipe: str, side: str, traffic: dict[str, Any], torch: str) -> None:
    """Put one side of a recipe into the results and leave the others as they are."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results["machine"] = {"torch": torch}
    row = results.setdefault(recipe, {"clips_a_step": CLIPS, "smallest_kernel_us": SHORTEST * 1e6, "sides": {}})
    row["sides"][side] = figures_of(traffic)
    if side.startswith("ours"):
        row[f"kernels of {side}"] = largest(traffic["rows"], SHOWN)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
