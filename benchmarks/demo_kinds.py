#!/usr/bin/env python
"""The demo with a small language model in place of its T5: both kinds from scratch, on the same corpus.

python benchmarks/demo_kinds.py --model runs/demo                    the demo's own run (`make demo`) is the peer
python benchmarks/demo_kinds.py --model runs/demo --steps 400        with fewer steps of the language model alone
python benchmarks/demo_kinds.py --model runs/demo --kept-times       times of a step as the results have them

The language model has the recipe `demo` but for its backbone; its runs are trained here unless they are finished, or
resumed where they were stopped. Time of training is the number of steps times the median processor time of a step,
loading included: processes of both kinds, one rank with one thread each, take turns of some steps on the same clips.
Writes benchmarks/results/demo_kinds.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sides import started, turns_of

from toolkit.files import write_text_atomically
from toolkit.recipe.model_cards import load_model_yaml

RESULTS = ROOT / "benchmarks" / "results" / "demo_kinds.json"
SETTINGS = ["model.backbone=demo_causal"]
KINDS = {"seq2seq": [], "language_model": SETTINGS}
CARDS = {"seq2seq": "demo", "language_model": "demo_causal"}
STEPS = [400, 1250]  # the second as many as the demo's
SHOWN = ("cer", "wer", "bleu1", "chrf")
TURN = 5  # steps
TARGETS = {"cer": 0.10, "time": 2.0}  # at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo"), help="the demo's finished run")
    parser.add_argument("--corpus", metavar="FOLDER", help="default: the corpus of that run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the language model's runs are")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N", help="of each of them, rising")
    parser.add_argument("--num-gpus", default="2", help="ranks that train (default 2)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of each kind (default 7)")
    parser.add_argument("--kept-times", action="store_true", help="do not measure a step again")
    parser.add_argument("--side", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        train_in_turns(arguments.side, arguments.corpus)
        return
    corpus = (
        arguments.corpus or json.loads((arguments.model / "environment.json").read_text(encoding="utf-8"))["corpus"]
    )
    runs = [("seq2seq", arguments.model)]
    for steps in arguments.steps:
        runs.append(("language_model", arguments.runs / f"demo_causal_{steps}"))
        if not (runs[-1][1] / "scores.json").is_file():
            train(runs[-1][1].resolve(), corpus, arguments.num_gpus, steps)
    seconds = kept_seconds() if arguments.kept_times else step_seconds(corpus, arguments.repeats)
    content = summary([row_of(kind, run, corpus, seconds[kind]) for kind, run in runs])
    write_text_atomically(RESULTS, json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


def train(run: Path, corpus: str, ranks: str, steps: int) -> None:
    """Train the language model, or resume it."""
    command = [
        *("deepspeed", "--num_gpus", ranks, "--master_port", "29751"),
        *("launch/train.py", "--recipe", "demo", f"run.dir={run}"),
        *("data.source=table", f"data.corpus={corpus}", *SETTINGS, f"training.max_steps={steps}"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)


def cer_of_decoder(run: Path, corpus: str) -> float:
    """The character error rate on the test split of a search that the CTC head takes no part in."""
    import torch

    from toolkit.corpus.packed import Corpus
    from toolkit.decoding.decode_split import evaluation_mode, translate_split
    from toolkit.models.loading.load import load_translator
    from toolkit.scoring.metrics import score

    torch.set_num_threads(1)
    model, processor = load_translator(run)
    model.config.ctc_search_weight = 0.0
    with evaluation_mode(model):
        rows = translate_split(model, Corpus.open(Path(corpus)).splits["test"], processor, batch_frames=8192)
    found = score([row.hypothesis for row in rows], [row.reference for row in rows]).cer
    assert found is not None, "the test split has texts"
    return found


def row_of(kind: str, run: Path, corpus: str, seconds: float) -> dict[str, Any]:
    """A finished run; ``seconds`` of its steps."""
    found, card = json.loads((run / "scores.json").read_text(encoding="utf-8")), load_model_yaml(CARDS[kind])
    return {
        "kind": kind.replace("_", " "),
        "architecture": card.architecture,
        "parameters": card.parameters,
        "steps": found["steps"],
        "step_ms": round(1000 * seconds),
        "minutes_of_one_rank": round(found["steps"] * seconds / 60, 1),
        **{name: round(found["splits"]["test"]["scores"][name], 4) for name in SHOWN},
        "cer_decoder_alone": round(cer_of_decoder(run, corpus), 4),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the results file: the last run beside the first."""
    peer, ours = rows[0], rows[-1]
    minutes = [row["steps"] * row["step_ms"] for row in (ours, peer)]
    return {
        "language_model_cer": {"ours_cer": ours["cer"], "peer_cer": peer["cer"], "target": f"<= {TARGETS['cer']}"},
        "language_model_time": {
            "ours_minutes": ours["minutes_of_one_rank"],
            "peer_minutes": peer["minutes_of_one_rank"],
            "ratio": round(minutes[0] / minutes[1], 2),
            "target": f"<= {TARGETS['time']}",
        },
        "kinds": rows,
    }


def kept_seconds() -> dict[str, float]:
    """Seconds of a step of each kind, which an earlier call measured in turns."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["kinds"]
    return {row["kind"].replace(" ", "_"): row["step_ms"] / 1000 for row in rows}


def step_seconds(corpus: str, repeats: int) -> dict[str, float]:
    """Seconds of a step of each kind, the median over turns; the first turn of each is not counted."""
    with ExitStack() as stack:
        commands = {kind: [__file__, "--side", kind, "--corpus", corpus] for kind in KINDS}
        processes = {kind: stack.enter_context(started(command)) for kind, command in commands.items()}
        turns = turns_of(processes, dict.fromkeys(KINDS, TURN), repeats)
    return {kind: median(turn["processor_seconds"] / TURN for turn in taken) for kind, taken in turns.items()}


def train_in_turns(kind: str, place: str) -> None:
    """One side: the toolkit's own loop on one rank, in the micro-batches that a rank of two has."""
    import torch
    from training_side import turns_of_ours
    from turns import answer

    from toolkit.corpus.packed import Corpus
    from toolkit.recipe.resolve import resolve_named

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *("data.source=table", f"data.corpus={place}", f"run.dir={folder}/run"),
            *("training.micro_batch_size=16", "training.epochs=1000", *KINDS[kind]),
        ]
        resolved = resolve_named("demo", settings, 1, has_gpu=torch.cuda.is_available())
        used = 0.0
        for _, _, clips, seconds in turns_of_ours(resolved, Corpus.open(Path(place))):
            answer(clips, seconds, processor_seconds=time.process_time() - used)
            used = time.process_time()


if __name__ == "__main__":
    main()
