#!/usr/bin/env python
"""How fast the toolkit trains, each figure beside its peer in the same run.

python benchmarks/training.py                     all figures, about 50 minutes on two quiet cores
python benchmarks/training.py --only throughput   one of them; the others stay as they were
python benchmarks/training.py --only auto --before COMMIT   beside the project as it was at a commit, too

Full-size T5-Small on clips and sentences as long as iSign's, made here. The ways of training are processes that take
turns; a rate is that of all rounds together. Writes benchmarks/results/training.json and docs/pictures/training.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from sides import checked_out, run_there, started, take_turn
from training_checkpoint import measure as measure_checkpoint
from training_corpus import make_backbone, make_corpus

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "training.json"
PICTURE = HERE.parent / "docs" / "pictures" / "training.png"
BATCH = ("training.global_batch_size=32", "training.micro_batch_size=8")
# Ours and the bare loop take recipe t5_small's ZeRO-1; Seq2SeqTrainer takes ZeRO-2, and so do we once more beside it.
ZERO = {"ours_zero2": ["deepspeed=zero2"], "hf": ["deepspeed=zero2"]}
SIDES = {"hf": "Seq2SeqTrainer, ZeRO-2", "padded": "all padded,\nplain loop", "bare": "bare DeepSpeed"}
TARGETS = {"vs_hf_trainer": 1.4, "vs_pad_to_max": 2.4, "vs_bare_deepspeed": 0.97}  # at least
STEPS = 4  # of a turn
NAMES = ("throughput", "auto", "mfu", "two_rank_speedup", "checkpoint_block_s", "start_vs_bare")

# What makes a step fast, one change after the other, each on top of those before it.
WITHOUT = ["label_scores", "quick_dropout", "quick_attention", "quick_norm", "kept_memory"]
CHANGES: dict[str, list[str]] = {
    "ZeRO-2, micro-batches of 8": ["deepspeed=zero2", *BATCH, "--without", *WITHOUT],
    "scores of labels alone, in chunks": ["deepspeed=zero2", *BATCH, "--without", *WITHOUT[1:]],
    "quick dropout": ["deepspeed=zero2", *BATCH, "--without", *WITHOUT[2:]],
    "quick attention": ["deepspeed=zero2", *BATCH, "--without", *WITHOUT[3:]],
    "quick normalisation": ["deepspeed=zero2", *BATCH, "--without", *WITHOUT[4:]],
    "freed memory is kept, in huge pages": ["deepspeed=zero2", *BATCH],
    "ZeRO-1": [*BATCH],
    "global batches of 128, micro-batches of 64": ["training.global_batch_size=128", "training.micro_batch_size=64"],
    "micro-batches of 128": ["training.global_batch_size=128", "training.micro_batch_size=128"],
}

# The recipe as it is, which chooses micro-batches; the same with small ones; small steps, too; these at an older
# commit; Seq2SeqTrainer's own defaults. Each with the steps of a turn, which is one epoch: all train the same clips.
AUTO_CLIPS = 512
AUTO: dict[str, tuple[str, list[str], int]] = {
    "auto": ("ours", ["training.micro_batch_size=auto"], AUTO_CLIPS // 128),
    "auto_vs_micro_batches_of_8": ("ours", ["training.micro_batch_size=8"], AUTO_CLIPS // 128),
    "auto_vs_steps_of_32_in_8": ("ours", [*BATCH], AUTO_CLIPS // 32),
    "auto_vs_steps_of_32_in_8_before": ("ours", [*BATCH], AUTO_CLIPS // 32),
    "auto_vs_hf_default": (
        "hf",
        [*ZERO["hf"], "training.global_batch_size=8", "training.micro_batch_size=8"],
        AUTO_CLIPS // 8,
    ),
}
AUTO_TARGETS = {"auto_vs_steps_of_32_in_8": 2.4, "auto_vs_steps_of_32_in_8_before": 2.4, "auto_vs_hf_default": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each side (default 5)")
    parser.add_argument("--before", metavar="COMMIT", help="auto takes turns with the project at this commit, too")
    arguments = parser.parse_args()
    benchmarks = {
        "throughput": throughput,
        "auto": partial(auto, before=arguments.before),
        "mfu": mfu,
        "two_rank_speedup": two_rank_speedup,
        "checkpoint_block_s": lambda *_: {"checkpoint_block_s": measure_checkpoint()},
        "start_vs_bare": start_vs_bare,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_backbone(folder / "backbone", "t5_small", make_corpus(folder / "corpus").splits["train"].texts)
        for benchmark in arguments.only or NAMES:
            for key, result in benchmarks[benchmark](folder, arguments.rounds).items():
                print(key, json.dumps(result), flush=True)
                merge(key, result)
    draw(json.loads(RESULTS.read_text(encoding="utf-8")), PICTURE)


def merge(key: str, result: dict[str, Any]) -> None:
    """Put one figure into the results and leave the others as they are."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(results | {key: result | {"machine": machine}}, indent=2) + "\n", encoding="utf-8")


def throughput(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Clips a second of all four ways, which take turns."""
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in ("ours", "ours_zero2", *SIDES)}
    with ExitStack() as stack:
        processes = {
            side: stack.enter_context(side_process(side.split("_")[0], folder, [*BATCH, *ZERO.get(side, [])]))
            for side in turns
        }
        for side in turns:
            take_turn(processes[side], 1)  # the first steps of a process are no measure
        for number in range(rounds):
            for side, process in processes.items():
                turns[side].append(take_turn(process, STEPS))
            print(f"round {number + 1} of {rounds}: {rates_of(turns, number)}", flush=True)
    figures: dict[str, dict[str, Any]] = {
        key: {
            "ours_clips_per_second": speed(turns["ours"]),
            "peer_clips_per_second": speed(turns[side]),
            "ratio": round(speed(turns["ours"]) / speed(turns[side]), 3),
            "target": f">= {TARGETS[key]}",
        }
        for key, side in (("vs_hf_trainer", "hf"), ("vs_pad_to_max", "padded"), ("vs_bare_deepspeed", "bare"))
    }
    figures["vs_hf_trainer"]["ratio_both_zero2"] = round(speed(turns["ours_zero2"]) / speed(turns["hf"]), 3)
    return figures


def mfu(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Model-FLOPs utilisation against a matrix product measured in the same process, change after change."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CHANGES}
    for number in range(max(2, rounds // 2)):
        for name, settings in CHANGES.items():  # one at a time: together they would not fit the memory
            with side_process("ours", folder, settings) as process:
                take_turn(process, 2)
                turns[name] += [take_turn(process, STEPS) for _ in range(2)]
            print(f"round {number + 1}: {name}: {turns[name][-1]}", flush=True)
    changes = {
        name: {"mfu": round(median(turn["mfu"] for turn in taken), 3), "clips_per_second": speed(taken)}
        for name, taken in turns.items()
    }
    return {"mfu": {"mfu": max(row["mfu"] for row in changes.values()), "changes": changes, "target": ">= 0.35"}}


def auto(folder: Path, rounds: int, before: str | None) -> dict[str, dict[str, Any]]:
    """Clips a second of the recipe as it is, which chooses its micro-batches, against other ways; epoch after epoch.

    One more turn is profiled: how much of it are matrix products, and how near these are to the processor's peak.
    """
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # choices of an earlier measurement do not count
    now, older = folder / "auto", folder / "auto_before"
    make_corpus(now / "corpus", AUTO_CLIPS)
    shutil.copytree(folder / "backbone", now / "backbone")
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in AUTO if before or not name.endswith("_before")}
    watched: list[dict[str, float]] = []
    with checked_out(before) if before else nullcontext() as project:
        if project:
            older.mkdir()
            shutil.copytree(folder / "backbone", older / "backbone")
            call = "from pathlib import Path; from training_corpus import make_corpus; make_corpus(Path({!r}), {})"
            run_there(project, ["-c", call.format(str(older / "corpus"), AUTO_CLIPS)])
        for number in range(rounds):
            for name, taken in turns.items():  # one process at a time: together they would not fit the memory
                side, settings, steps = AUTO[name]
                there, clips = (project, older) if name.endswith("_before") else (HERE.parent, now)
                command = [str(there / "benchmarks" / "training_side.py"), side, str(clips), *settings]
                with started(command) as process:
                    take_turn(process, max(1, steps // 4))
                    taken.append(take_turn(process, steps))
                    if name == "auto":
                        watched.append(take_turn(process, f"profile {steps}"))
            print(f"round {number + 1} of {rounds}: {rates_of(turns, number)}", flush=True)
    ours = turns.pop("auto")
    share = median(turn["products_share"] for turn in watched)
    bound = {
        "mfu": round(median(turn["mfu"] for turn in watched), 3),
        "products_share_of_time": round(share, 3),
        "products_of_peak": round(median(turn["mfu"] / turn["products_share"] for turn in watched), 3),
        "speedup_if_all_else_were_free": round(1 / share, 2),
        "frames_with_padding": round(median(turn["padded_frames"] for turn in ours), 3),
        "frames_with_padding_of_steps_of_32_in_8": round(
            median(turn["padded_frames"] for turn in turns["auto_vs_steps_of_32_in_8"]), 3
        ),
        "target": "",
    }
    return {"auto_bound": bound} | {
        name: {
            "ours_clips_per_second": speed(ours),
            "peer_clips_per_second": speed(taken),
            "ratio": round(median(rate(own) / rate(other) for own, other in zip(ours, taken, strict=True)), 3),
            "target": f">= {AUTO_TARGETS[name]}" if name in AUTO_TARGETS else "",
            "micro_batches": ours[0]["micro_batch"],
            **({"commit": before} if name.endswith("_before") else {}),
        }
        for name, taken in turns.items()
    }


def two_rank_speedup(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Two ranks of one thread against one rank of one thread, start by start, in micro-batches of 16."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    batch = "training.micro_batch_size=16"  # of the recipe's global batch
    command = [str(HERE / "training_side.py"), "ours", str(folder), batch, "--threads", "1", "--turns", "1", "2", "2"]
    for _ in range(max(2, rounds // 2)):
        for ranks in rates:
            launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
            answers = answers_of([*launcher, "--master_port", "29741", *command])
            rates[ranks] += [rate(answer) for answer in answers[1:]]
    one, two = (median(rates[ranks]) for ranks in (1, 2))
    return {
        "two_rank_speedup": {
            "one_rank_clips_per_second": round(one, 2),
            "two_rank_clips_per_second": round(two, 2),
            "ratio": round(two / one, 3),
            "target": ">= 1.7",
        }
    }


def start_vs_bare(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds from the command to the end of the first step, of launch/train.py and of a bare DeepSpeed script."""
    ours, bare = [], []
    settings = [f"data.corpus={folder / 'corpus'}", f"model.backbone={folder / 'backbone'}", *BATCH]
    train = [sys.executable, str(HERE.parent / "launch" / "train.py"), "--recipe", "t5_small", *settings]
    for number in range(max(3, rounds // 2)):
        started = time.perf_counter()
        run_dir = folder / f"start_{number}"
        process = subprocess.Popen([*train, f"run.dir={run_dir}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not first_step_is_printed(run_dir) and process.poll() is None:
            time.sleep(0.02)
        ours.append(time.perf_counter() - started)
        process.kill()
        if process.wait() != -9:
            sys.exit(f"{' '.join(train)} ended before its first step: {run_dir}/log.txt says more")
        started = time.perf_counter()
        with side_process("bare", folder, BATCH) as peer:
            take_turn(peer, 1)
            bare.append(time.perf_counter() - started)
    return {
        "start_vs_bare": {
            "ours_seconds": round(median(ours), 2),
            "bare_seconds": round(median(bare), 2),
            "ratio": round(median(a / b for a, b in zip(ours, bare, strict=True)), 3),
            "target": "<= 1.4",
        }
    }


def first_step_is_printed(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"step": 1' in metrics.read_text(encoding="utf-8")


def open_sides(
    stack: ExitStack, folder: Path, commands: dict[str, tuple[str, list[str]]]
) -> dict[str, subprocess.Popen[str]]:
    """Processes that build their models at the same time; each is ready, and idle until its turn."""
    with ThreadPoolExecutor(len(commands)) as threads:
        started = {
            side: threads.submit(stack.enter_context, side_process(way, folder, settings))
            for side, (way, settings) in commands.items()
        }
    return {side: process.result() for side, process in started.items()}


def side_process(
    side: str, folder: Path, settings: list[str] | tuple[str, ...]
) -> AbstractContextManager[subprocess.Popen[str]]:
    """A process that trains in one way, a turn at a time."""
    return started([str(HERE / "training_side.py"), side, str(folder), *settings])


def answers_of(command: list[str]) -> list[dict[str, float]]:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return answers


def rate(turn: dict[str, float]) -> float:
    return turn["clips"] / turn["seconds"]


def speed(turns: list[dict[str, float]]) -> float:
    """Clips a second over all turns: batches sorted by length make single ones fast or slow."""
    return round(sum(turn["clips"] for turn in turns) / sum(turn["seconds"] for turn in turns), 2)


def rates_of(turns: dict[str, list[dict[str, float]]], number: int) -> str:
    return "  ".join(f"{side} {rate(taken[number]):.2f} clips/s" for side, taken in turns.items())


def draw(results: dict[str, Any], path: Path) -> None:
    """Clips a second of all ways, what each change to the step gave, and two ranks beside one."""
    from matplotlib.figure import Figure

    grey, blue = "#b8bec6", "#2563a8"
    panels: list[tuple[str, list[str], list[float], list[str]]] = []
    if "vs_hf_trainer" in results:
        peers = [
            ("vs_pad_to_max", SIDES["padded"]),
            ("vs_hf_trainer", SIDES["hf"]),
            ("vs_bare_deepspeed", SIDES["bare"]),
        ]
        panels.append(
            (
                "T5-Small, one rank\nclips/s (more is better)",
                [name.replace(", ", ",\n") for _, name in peers] + ["this toolkit"],
                [results[key]["peer_clips_per_second"] for key, _ in peers]
                + [results["vs_hf_trainer"]["ours_clips_per_second"]],
                [grey, grey, grey, blue],
            )
        )
    if "mfu" in results:
        changes = results["mfu"]["changes"]
        names = [name.replace(", ", ",\n").replace(" of ", "\nof ") for name in changes]
        panels.append(("Model-FLOPs utilisation\n(change after change)", names,
                       [row["mfu"] for row in changes.values()], [blue] * len(changes)))  # fmt: skip
    if "two_rank_speedup" in results:
        row = results["two_rank_speedup"]
        panels.append(("One thread a rank\nclips/s", ["1 rank", "2 ranks"],
                       [row["one_rank_clips_per_second"], row["two_rank_clips_per_second"]], [blue, blue]))  # fmt: skip
    widths = [len(names) for _, names, _, _ in panels]
    figure = Figure(figsize=(1.45 * sum(widths), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (title, names, values, colors) in zip(axes, panels, strict=True):
        bars = axis.bar(names, values, color=colors, width=0.6)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
