#!/usr/bin/env python
"""Beam search of a language model behind poses, beside HuggingFace's ``generate(inputs_embeds=...)``: speed and memory.

python benchmarks/evaluation_prefixes.py    writes language_model_* into benchmarks/results/evaluation.json

Both sides have the same random weights of a published size and the same clips, whose prefixes have 150 positions each,
in one batch. Each is a process of its own with one thread, and they take turns; medians of their processor time are
compared, and wall-clock ones stand beside them. Memory is the peak of the resident set during a side's turns, beyond
what it was when the weights were there. Token ids are compared and must be equal. With random weights no text ends by
itself: no clip leaves our search early.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch
from turns import answer, orders

RESULTS = HERE / "results" / "evaluation.json"
CARD = "smollm2_135m"
CLIPS, FRAMES, STRIDE = 16, 300, 2
SEARCH = {"num_beams": 5, "length_penalty": 0.6, "max_new_tokens": 32}
SIDES = ("hf", "ours")
TARGETS = {"speed": 2.0, "memory": 0.5}  # at least, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each side (default 3)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        search_in_turns(arguments.side)
        return
    from evaluation import merge

    for key, result in language_model_vs_generate(arguments.repeats).items():
        print(key, json.dumps(result))
        merge(key, result, RESULTS)


def language_model_vs_generate(repeats: int) -> dict[str, dict[str, Any]]:
    """Turns of both sides: a row of clips a second and a row of memory."""
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        sides = {side: stack.enter_context(start(side)) for side in SIDES}
        for _ in range(repeats):
            for side, process in sides.items():
                taken[side].append(take_turn(process))
                print(f"{side}: {taken[side][-1]}"[:90], flush=True)
        for process in sides.values():
            assert process.stdin
            process.stdin.close()
    wall, seconds = (
        {side: median(turn[key] for turn in turns) for side, turns in taken.items()}
        for key in ("seconds", "processor_seconds")
    )
    peaks = {side: max(turn["peak_mib"] for turn in turns) for side, turns in taken.items()}
    pairs = zip(taken["hf"][0]["tokens"], taken["ours"][0]["tokens"], strict=True)
    same = sum(their == our for their, our in pairs)
    if same != CLIPS:
        sys.exit(f"{CLIPS - same} of {CLIPS} texts differ from those of HuggingFace's generate")
    setting = {
        "model": CARD,
        "clips": CLIPS,
        "beams": SEARCH["num_beams"],
        "positions": FRAMES // STRIDE,
        "tokens": SEARCH["max_new_tokens"],
    }
    return {
        "language_model_vs_generate": {
            "hf_clips_per_second": round(CLIPS / seconds["hf"], 3),
            "ours_clips_per_second": round(CLIPS / seconds["ours"], 3),
            "ratio": round(seconds["hf"] / seconds["ours"], 2),
            "target": f">= {TARGETS['speed']}",
            "wall_clock_ratio": round(wall["hf"] / wall["ours"], 2),
            "same_texts": same,
            **setting,
        },
        "language_model_memory": {
            "hf_MiB": round(peaks["hf"]),
            "ours_MiB": round(peaks["ours"]),
            "ratio": round(peaks["ours"] / peaks["hf"], 2),
            "target": f"<= {TARGETS['memory']}",
            **setting,
        },
    }


def start(side: str) -> subprocess.Popen[str]:
    """The process of one side, which has built its model."""
    command = [sys.executable, __file__, "--side", side]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    if not any(line.strip() == "ready" for line in process.stdout):
        sys.exit(f"{side} did not start")
    return process


def take_turn(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout and process.stdin
    process.stdin.write("1\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    sys.exit("a side ended during its turn")


def search_in_turns(side: str) -> None:
    """One side: the same model and clips, searched by HuggingFace's loop or by ours."""
    from toolkit.decoding.beam_search import beam_search
    from toolkit.decoding.decode_split import evaluation_mode

    torch.set_num_threads(1)
    model, clips = make_model(), make_clips()
    loop = {"custom_generate": beam_search} if side == "ours" else {}
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    with evaluation_mode(model):
        for _ in orders():
            started, processor = time.perf_counter(), time.process_time()
            found = model.generate(**clips, **SEARCH, **loop)
            used = {"processor_seconds": time.process_time() - processor, "peak_mib": resident_mib("VmHWM") - before}
            answer(CLIPS, time.perf_counter() - started, **used, tokens=found.tolist())


def make_model() -> Any:
    """A translator around a language model of its published size, with random weights."""
    from transformers import AutoConfig

    from toolkit.models.backbone import new_backbone
    from toolkit.models.configuration import PoseTranslatorConfig
    from toolkit.models.translator import PoseTranslator
    from toolkit.poses.landmarks import load_landmark_set
    from toolkit.recipe.model_cards import load_model_yaml
    from toolkit.recipe.sections.model import PoseEncoder

    card, landmarks = load_model_yaml(CARD), load_landmark_set("hands_body_50")
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    backbone = new_backbone(AutoConfig.for_model(card.architecture, **card.config, **tokens))
    encoder = PoseEncoder(kind="conv", stride=STRIDE).model_dump()
    config = PoseTranslatorConfig(
        backbone=backbone.config.to_dict(),
        pose_encoder=encoder,
        num_points=landmarks.num_points,
        num_channels=landmarks.num_channels,
        landmark_set=landmarks.to_dict(),
    )
    model = PoseTranslator(config, backbone)
    model.generation_config.update(**tokens)
    return model


def make_clips() -> dict[str, torch.Tensor]:
    """Random walks, as different from each other as motion is."""
    from toolkit.poses.landmarks import load_landmark_set

    landmarks = load_landmark_set("hands_body_50")
    generator = torch.Generator().manual_seed(1)
    shape = (CLIPS, FRAMES, landmarks.num_points, landmarks.num_channels)
    poses = torch.randn(shape, generator=generator).cumsum(dim=1) / FRAMES**0.5
    everything = torch.ones(shape[:2], dtype=torch.bool)
    return {"poses": poses, "visible": torch.ones(shape[:3], dtype=torch.bool), "frame_mask": everything}


def resident_mib(key: str) -> float:
    """A figure of this process's memory in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


if __name__ == "__main__":
    main()
