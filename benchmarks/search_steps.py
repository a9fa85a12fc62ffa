#!/usr/bin/env python
"""What a token of a beam search costs the host: T5-Base of full depth and hardly any width, five beams.

python benchmarks/search_steps.py     about two minutes on a quiet core

No GPU is needed: operator calls stand for launches, and time is that of Python and dispatch. A graph is captured by
running its calls, and replayed by nothing at all, as a GPU needs nothing of the host but one launch. Sides take turns.
Writes benchmarks/results/search_steps.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from host_cost import NARROW
from operator_calls import Calls
from torch import Tensor
from transformers import T5Config

from toolkit.decoding import beam_search as searching
from toolkit.decoding.step_graphs import StepGraphs
from toolkit.models import PoseTranslator, PoseTranslatorConfig
from toolkit.recipe.model_cards import load_model_yaml

RESULTS = Path(__file__).resolve().parent / "results" / "search_steps.json"
CLIPS, FRAMES, BEAMS = 16, 90, 5
SHORT, LONG = 10, 30  # tokens of texts; a token's cost is the difference by their difference
ENCODER = {"kind": "conv", "hidden": 16, "layers": 1, "kernel": 3, "stride": 2, "dropout": 0.0, "positions": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each side (default 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds)
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(rounds: int) -> dict[str, Any]:
    """All sides in turns."""
    model = narrow_translator()
    inputs = (torch.randn(CLIPS, FRAMES, 5, 3), torch.ones(CLIPS, FRAMES, 5, dtype=torch.bool))
    searching.tokens_between_looks = lambda device: searching.TOKENS_BETWEEN_LOOKS  # as on a GPU
    captured: list[int] = []
    sides: dict[str, dict[str, Any]] = {
        "hf_generate": {},
        "ours": {"custom_generate": searching.beam_search},
        "ours_static_cache": {"custom_generate": searching.beam_search, "graphs": without_capture()},
        "ours_graphs": {"custom_generate": searching.beam_search, "graphs": StepGraphs(counted(captured))},
    }

    def search(settings: dict[str, Any], tokens: int) -> None:
        lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate(*inputs, inputs[1][..., 0], num_beams=BEAMS, length_penalty=0.6, **lengths, **settings)

    figures = {}
    for side, settings in sides.items():
        search(settings, LONG)  # captures, and what libraries do at their first call
        figures[side] = counts(lambda tokens, settings=settings: search(settings, tokens))
    milliseconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, settings in sides.items():
            seconds = [timed(lambda n=tokens, given=settings: search(given, n)) for tokens in (SHORT, LONG)]
            milliseconds[side].append(1000 * (seconds[1] - seconds[0]) / (LONG - SHORT))
    for side, taken in milliseconds.items():
        figures[side]["ms_a_token"] = round(median(taken), 2)
    ratios = {
        f"{side}_to_graphs": round(
            median(a / b for a, b in zip(milliseconds[side], milliseconds["ours_graphs"], strict=True)), 2
        )
        for side in ("hf_generate", "ours")
    }
    return {
        **ratios,
        "kernels_in_a_graph": captured[-1],
        "sides": figures,
        "clips": CLIPS,
        "beams": BEAMS,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__},
    }


def narrow_translator() -> PoseTranslator:
    """T5-Base with all of its layers, each of them narrow, and random weights."""
    torch.manual_seed(0)
    backbone = T5Config(**load_model_yaml("t5_base").config | NARROW | {"vocab_size": 512})
    config = PoseTranslatorConfig(backbone.to_dict(), ENCODER, num_points=5)
    model = PoseTranslator(config).eval()
    for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        setattr(model.generation_config, key, getattr(config, key))
    return model


def without_capture() -> StepGraphs:
    """The static cache alone."""
    graphs = StepGraphs(counted([]))
    graphs.capture = None
    return graphs


def counted(captured: list[int]) -> Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]:
    """A capture whose replays do nothing; it notes how many kernels are in each."""

    def capture(call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        with Calls() as calls:
            result = call()
        captured.append(calls.kernels)
        return result, lambda: None

    return capture


def counts(search: Callable[[int], None]) -> dict[str, float]:
    """Operator calls, kernels and waits of a token."""
    found = []
    for tokens in (SHORT, LONG):
        with Calls() as calls:
            search(tokens)
        found.append((calls.total, calls.kernels, sum(calls.waits.values())))
    names = ("operator_calls_a_token", "kernels_a_token", "waits_a_token")
    more = LONG - SHORT
    return {name: round((long - short) / more, 1) for name, short, long in zip(names, *found, strict=True)}


def timed(call: Callable[[], None]) -> float:
    """Seconds of a call."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
