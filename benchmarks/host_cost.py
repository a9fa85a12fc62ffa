#!/usr/bin/env python
"""What a micro-batch costs the host: T5-Base of full depth and hardly any width, so that Python and dispatch are left.

python benchmarks/host_cost.py                 all cases, about 10 minutes on two quiet cores
python benchmarks/host_cost.py --only zero1_8  one of them; the others stay as they were
python benchmarks/host_cost.py --only waits    how often the host waits under each DeepSpeed JSON

No GPU is needed. The code is that of a GPU (TOOLKIT_CPU_CODE=0), on one thread; what is one kernel there is one call.
Clips are of one length and have one text: oneDNN makes a kernel for every new shape, which takes longer than Python.
Ways of training are processes that take turns. Writes benchmarks/results/host_cost.json: milliseconds and operator
calls a micro-batch, and how often in a step the host waits for a GPU, by whose code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from sides import take_turn
from training import side_process
from training_corpus import make_corpus, sentences
from transformers import T5Config, T5ForConditionalGeneration

from toolkit.models.tokenizers import make_tokenizer
from toolkit.recipe.deepspeed.json_file import ds_config_names
from toolkit.recipe.model_cards import load_model_yaml

RESULTS = Path(__file__).resolve().parent / "results" / "host_cost.json"
NARROW = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4}
CLIPS = 4  # of a micro-batch
FRAMES = 90  # of a clip
GPU_HOSTS = ("zero2_fp16", "zero3_plus_plus")  # tests/recipe holds the list to what the resolver refuses
MICRO_BATCHES = (1, 8)  # of a step
STEPS = {1: 4, 8: 1}  # of a turn
WARM = {1: 8, 8: 2}  # before the first turn
CASES = {f"zero{stage}_{number}": (stage, number) for number in MICRO_BATCHES for stage in (0, 1, 2)}
# Ours against each: at most, of milliseconds.
TARGETS = {0: {"plain": 1.1, "hf": 0.8}, 1: {"bare": 1.05, "hf": 0.8}, 2: {"bare": 1.05, "hf": 0.8}}
# What makes fewer operator calls, and by what share: at least.
AS_WRITTEN = ["gpu_layers", "fewer_calls"]
SAVED = 0.4
SIDES: dict[str, list[str]] = {
    "ours": ["ours"],
    "ours_with_all_calls": ["ours", "--without", *AS_WRITTEN],
    "plain": ["plain"],
    "bare": ["bare"],
    "hf": ["hf"],
}


def main() -> None:
    cases = [*CASES, "waits"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=cases, metavar="CASE", default=cases, help=", ".join(cases))
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each side (default 7)")
    arguments = parser.parse_args()
    os.environ |= {"TOOLKIT_CPU_CODE": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = sentences(64)
        make_narrow_backbone(folder / "backbone", texts)
        make_corpus(folder / "corpus", clips=512, texts=texts[:1] * 512, length=FRAMES)
        for case in arguments.only:
            counts_only = case == "waits"
            write(case, waits_of_jsons(folder) if counts_only else measure(folder, *CASES[case], arguments.rounds))


def make_narrow_backbone(folder: Path, texts: list[str]) -> None:
    """A model folder: T5-Base with all of its layers, each of them narrow, and a tokenizer trained on ``texts``."""
    tokenizer = make_tokenizer("train", texts)
    config = T5Config(**load_model_yaml("t5_base").config | NARROW | {"vocab_size": len(tokenizer)})
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings_of(deepspeed: str, micro_batches: int) -> list[str]:
    return [
        f"deepspeed={deepspeed}",
        "model.pose_encoder.hidden=16",
        f"training.global_batch_size={CLIPS * micro_batches}",
        f"training.micro_batch_size={CLIPS}",
        "training.workers=1",
        "training.padding=ladder",  # as on GPUs
        "augmentation.speed=0",
        "--as-on-gpu",
        *("--threads", "1"),
    ]


def waits_of_jsons(folder: Path) -> dict[str, Any]:
    """How often the host waits in a step of ours with eight micro-batches, by DeepSpeed JSON, in its own precision."""
    found = {}
    for name in [name for name in ds_config_names() if name not in GPU_HOSTS and "nvme" not in name]:
        with side_process("ours", folder, settings_of(name, MICRO_BATCHES[-1])) as process:
            take_turn(process, WARM[MICRO_BATCHES[-1]])
            figures = count(process, MICRO_BATCHES[-1])
        found[name] = {key: value for key, value in figures.items() if "wait" in key}
    return {"sides": found}


def measure(folder: Path, stage: int, micro_batches: int, rounds: int) -> dict[str, Any]:
    """All sides of one case, in turns."""
    settings = [*settings_of(f"zero{stage}", micro_batches), "ds.bf16.enabled=false"]
    compared = {side: command for side, command in SIDES.items() if side in TARGETS[stage] or side.startswith("ours")}
    milliseconds: dict[str, list[float]] = {side: [] for side in compared}
    figures: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        processes = {}
        for side, (name, *more) in compared.items():
            processes[side] = stack.enter_context(side_process(name, folder, [*settings, *more]))
            take_turn(processes[side], WARM[micro_batches])  # the first steps of a process are no measure
            figures[side] = count(processes[side], micro_batches)
        for _ in range(rounds):
            for side, process in processes.items():
                turn = take_turn(process, STEPS[micro_batches])
                milliseconds[side].append(1000 * turn["seconds"] / STEPS[micro_batches] / micro_batches)
    for side, taken in milliseconds.items():
        figures[side]["ms_a_micro_batch"] = round(median(taken), 1)
    # Turns of one round meet the same load of the machine.
    ratios = {
        side: round(median(a / b for a, b in zip(milliseconds["ours"], milliseconds[side], strict=True)), 3)
        for side in TARGETS[stage]
    }
    calls = {side: found["operator_calls"] for side, found in figures.items()}
    (peer, target), (_, target_hf) = TARGETS[stage].items()
    return {
        "ours_ms": figures["ours"]["ms_a_micro_batch"],
        f"{peer}_ms": figures[peer]["ms_a_micro_batch"],
        "ratio": ratios[peer],
        "target": f"<= {target} of {peer}",
        "ratio_to_hf": ratios["hf"],
        "target_of_hf": f"<= {target_hf}",
        "operator_calls_saved": round(1 - calls["ours"] / calls["ours_with_all_calls"], 3),
        "target_of_saved": f">= {SAVED}",
        "sides": figures,
    }


def count(process: Any, micro_batches: int) -> dict[str, Any]:
    """Operator calls and kernels a micro-batch of a side, and the waits of a step."""
    counted = take_turn(process, "count")
    waits: dict[str, int] = {}
    of_deepspeed = []
    for package, function, what, times in counted["waits"]:
        waits[package] = waits.get(package, 0) + times
        if package == "deepspeed":
            of_deepspeed.append(f"{times} x {function}: {what}")
    return {
        "operator_calls": round(counted["operators"] / micro_batches),
        "kernels": round(counted["kernels"] / micro_batches),
        "waits_of_ours": sum(waits.get(package, 0) for package in ("toolkit", "transformers", "other")),
        "waits_of_deepspeed": sum(waits.get(package, 0) for package in ("deepspeed",)),
        "waits_of_hf": sum(waits.get(package, 0) for package in ("accelerate",)),
        "deepspeed_waits_for": "; ".join(of_deepspeed),
    }


def write(case: str, result: dict[str, Any]) -> None:
    """Put one case into the results and leave the others as they are."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["machine"] = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(results | {case: result}, indent=2) + "\n", encoding="utf-8")
    print(case, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
