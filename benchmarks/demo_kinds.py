#!/usr/bin/env python
"""The demo with a small language model in place of its T5: both kinds from scratch, on the same corpus.

python benchmarks/demo_kinds.py --model runs/demo                    the demo's own run (`make demo`) is the peer
python benchmarks/demo_kinds.py --model runs/demo --max-steps 400    with fewer steps of the language model

The language model has the recipe `demo` but for its backbone; its run is trained here unless it is finished. Time of
training is the number of steps times the median processor time of a step, loading included: processes of both kinds,
one rank with one thread each, take turns of some steps on the same clips. Writes benchmarks/results/demo_kinds.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from toolkit.files import write_text_atomically
from toolkit.recipe.model_cards import load_model_yaml

RESULTS = ROOT / "benchmarks" / "results" / "demo_kinds.json"
SETTINGS = ["model.backbone=demo_causal"]
KINDS = {"seq2seq": [], "language_model": SETTINGS}
SHOWN = ("cer", "wer", "bleu1", "chrf")
TURN = 5  # steps
TARGETS = {"cer": 0.10, "time": 2.0}  # at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo"), help="the demo's finished run")
    parser.add_argument("--corpus", metavar="FOLDER", help="default: the corpus of that run")
    parser.add_argument("--language-model", type=Path, default=Path("runs/demo_causal"), help="the other run")
    parser.add_argument("--max-steps", metavar="N", help="of the language model (default: the demo's)")
    parser.add_argument("--num-gpus", default="2", help="ranks that train (default 2)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of each kind (default 7)")
    parser.add_argument("--side", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        train_in_turns(arguments.side, arguments.corpus)
        return
    corpus = (
        arguments.corpus or json.loads((arguments.model / "environment.json").read_text(encoding="utf-8"))["corpus"]
    )
    runs = {"seq2seq": arguments.model, "language_model": arguments.language_model}
    if not (arguments.language_model / "scores.json").is_file():
        length = [f"training.max_steps={arguments.max_steps}"] if arguments.max_steps else []
        train(arguments.language_model.resolve(), corpus, arguments.num_gpus, length)
    scores = {kind: json.loads((run / "scores.json").read_text(encoding="utf-8")) for kind, run in runs.items()}
    alone = {kind: cer_of_decoder(run, corpus) for kind, run in runs.items()}
    seconds = step_seconds(corpus, arguments.repeats)
    content = summary(scores, alone, seconds)
    write_text_atomically(RESULTS, json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


def train(run: Path, corpus: str, ranks: str, length: list[str]) -> None:
    """Train the language model, or resume it."""
    command = [
        *("deepspeed", "--num_gpus", ranks, "--master_port", "29751"),
        *("launch/train.py", "--recipe", "demo", f"run.dir={run}"),
        *("data.source=table", f"data.corpus={corpus}", *SETTINGS, *length),
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


def summary(scores: dict[str, Any], alone: dict[str, float], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of the results file."""
    minutes = {kind: found["steps"] * seconds[kind] / 60 for kind, found in scores.items()}
    cards = {"seq2seq": load_model_yaml("demo"), "language_model": load_model_yaml("demo_causal")}
    rows = [
        {
            "kind": kind.replace("_", " "),
            "architecture": cards[kind].architecture,
            "parameters": cards[kind].parameters,
            "steps": found["steps"],
            "step_ms": round(1000 * seconds[kind]),
            "minutes_of_one_rank": round(minutes[kind], 1),
            **{name: round(found["splits"]["test"]["scores"][name], 4) for name in SHOWN},
            "cer_decoder_alone": round(alone[kind], 4),
        }
        for kind, found in scores.items()
    ]
    return {
        "language_model_cer": {"ours_cer": rows[1]["cer"], "target": f"<= {TARGETS['cer']}"},
        "language_model_time": {
            "ours_minutes": rows[1]["minutes_of_one_rank"],
            "peer_minutes": rows[0]["minutes_of_one_rank"],
            "ratio": round(minutes["language_model"] / minutes["seq2seq"], 2),
            "target": f"<= {TARGETS['time']}",
        },
        "kinds": rows,
    }


def step_seconds(corpus: str, repeats: int) -> dict[str, float]:
    """Seconds of a step of each kind, the median over turns; the first turn of each is not counted."""
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with side_process("seq2seq", corpus) as first, side_process("language_model", corpus) as second:
        for number in range(repeats + 1):
            for kind, process in zip(KINDS, (first, second), strict=True):
                turn = take_turn(process)
                if number:
                    taken[kind].append(turn["processor_seconds"] / TURN)
                    print(f"{kind}: {taken[kind][-1]:.3f} s a step", flush=True)
    return {kind: median(turns) for kind, turns in taken.items()}


@contextmanager
def side_process(kind: str, corpus: str) -> Iterator[subprocess.Popen[str]]:
    """A process that trains one kind, a turn at a time."""
    command = [sys.executable, __file__, "--side", kind, "--corpus", corpus]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout and process.stdin
        if not any(line.strip() == "ready" for line in process.stdout):
            sys.exit(f"{kind} did not start")
        yield process
        process.stdin.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def take_turn(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout and process.stdin
    process.stdin.write(f"{TURN}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    sys.exit("a side ended during its turn")


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
