#!/usr/bin/env python
"""How fast a split is translated and scored, each figure beside the plain way in the same run.

python benchmarks/evaluation.py --model runs/demo                   all figures; `make demo` trains the model
python benchmarks/evaluation.py --only metrics_vs_sacrebleu         one figure; the others stay as they were

Writes benchmarks/results/evaluation.json and docs/pictures/evaluation.png. The two ways take turns, and the medians are
compared; outputs are compared, too, and must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from evaluation_translate import translate_vs_bare
from sacrebleu.metrics import BLEU, CHRF

from toolkit.batching.collate import Batch, collate
from toolkit.cluster.devices import own_device
from toolkit.corpus.packed import Corpus, Split
from toolkit.decoding.decode_split import evaluation_mode, translate_split
from toolkit.evaluation.inputs import open_corpus, recipe_of
from toolkit.models.loading.load import load_translator
from toolkit.scoring.addends import frequent_words
from toolkit.scoring.metrics import score

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "evaluation.json"
PICTURE = HERE.parent / "docs" / "pictures" / "evaluation.png"
SEARCH = {"num_beams": 5, "length_penalty": 0.6, "max_new_tokens": 128}
MICRO_BATCH = 16  # clips of a batch in the plain way
BATCH_FRAMES = 8192  # of ours; the recipe's default
PAIRS = 100_000
TARGETS = {"vs_plain_generate": 3.0, "vs_hf_zero3": 5.0}  # at least
LARGEST_METRICS_SHARE = 1.7  # of sacreBLEU's time


def main() -> None:
    benchmarks = {
        "vs_plain_generate": vs_plain_generate,
        "vs_hf_zero3": vs_hf_zero3,
        "translate_vs_bare": lambda _: translate_vs_bare(),
        "metrics_vs_sacrebleu": metrics_vs_sacrebleu,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", metavar="RUN", help="a finished run (default runs/demo)")
    parser.add_argument("--corpus", metavar="FOLDER", help="default: the corpus of the run")
    parser.add_argument("--only", nargs="+", choices=benchmarks, metavar="KEY", help=", ".join(benchmarks))
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument(
        "--plain-clips", type=int, metavar="N", help="that HuggingFace's generate translates (default all)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default %(default)s; another one is not drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for key in arguments.only or benchmarks:
        result = benchmarks[key](arguments)
        print(key, json.dumps(result))
        merge(key, result, arguments.results)
    if arguments.results == RESULTS:
        draw(json.loads(RESULTS.read_text(encoding="utf-8")), PICTURE)


def merge(key: str, result: dict[str, Any], path: Path = RESULTS) -> None:
    """Put one figure into the results and leave the others as they are."""
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    path.write_text(json.dumps(results | {key: result | {"machine": machine}}, indent=2) + "\n", encoding="utf-8")


def vs_plain_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Corpus order, micro-batches padded to the split's longest clip, HuggingFace's ``generate`` on each."""
    device = own_device()
    model, processor = load_translator(arguments.model)
    model.to(device).config.ctc_search_weight = 0.0  # HuggingFace's beam search scores by the decoder only
    split = open_split(arguments.model, arguments.corpus)
    longest, number = int(split.frames.max()), min(arguments.plain_clips or len(split), len(split))

    def plain(number: int = number, at_once: int = MICRO_BATCH) -> list[str]:
        texts = []
        for start in range(0, number, at_once):
            clips = range(start, min(start + at_once, number))
            batch = padded_batch(split, clips, processor, longest).to(device)
            tokens = model.generate(batch.poses, batch.visible, batch.frame_mask, **SEARCH)
            texts += [" ".join(text.split()) for text in processor.batch_decode(tokens)]  # as ours
        return texts

    def ours(graphs: bool = True) -> list[str]:
        predictions = translate_split(model, split, processor, batch_frames=BATCH_FRAMES, graphs=graphs, **SEARCH)
        return [row.hypothesis for row in predictions]

    more: dict[str, Any] = {}
    with evaluation_mode(model):
        if device.type == "cuda":
            plain(min(MICRO_BATCH, number))  # libraries start at their first call
        texts, plain_seconds, ours_seconds = take_turns(plain, ours, arguments.repeats)
        if device.type == "cuda":
            both, without, graphed = take_turns(partial(ours, False), ours, 1)
            # A launch takes as long for a large batch: generate is fastest with all of its clips in one.
            _, at_once, _ = take_turns(partial(plain, at_once=number), list, 1)
            more = {
                "ratio_to_generate_of_all_at_once": round(at_once / number / ours_seconds * len(split), 2),
                "ratio_to_ours_without_graphs": round(without / graphed, 2),
                "same_texts_without_graphs": sum(map(str.__eq__, *both)),
            }
    return {
        "clips": len(split),
        "clips_of_plain": number,
        "beams": SEARCH["num_beams"],
        "plain_clips_per_second": round(number / plain_seconds, 2),
        "ours_clips_per_second": round(len(split) / ours_seconds, 2),
        "ratio": round(plain_seconds / number / ours_seconds * len(split), 2),
        "target": f">= {TARGETS['vs_plain_generate']}",
        "same_texts": sum(map(str.__eq__, *texts)),  # of those that both have
        **more,
    }


def vs_hf_zero3(arguments: argparse.Namespace) -> dict[str, Any]:
    """HuggingFace's ``Seq2SeqTrainer.evaluate`` under ZeRO-3 on two ranks; see ``evaluation_zero3.py``."""
    script = [str(HERE / "evaluation_zero3.py"), "--model", arguments.model, "--repeats", str(arguments.repeats)]
    corpus = ["--corpus", arguments.corpus] if arguments.corpus else []
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29731"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script, *corpus], capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"evaluation_zero3.py failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1])


def metrics_vs_sacrebleu(arguments: argparse.Namespace) -> dict[str, Any]:
    """All scores of 100,000 pairs against sacreBLEU's own BLEU and chrF++ alone, in processor time of one core."""
    hypotheses, references = make_pairs(PAIRS)
    frequent = frequent_words(references)

    def plain() -> list[float]:
        bleu, chrf = BLEU(), CHRF(word_order=2)
        return [metric.corpus_score(hypotheses, [references]).score for metric in (bleu, chrf)]

    def ours() -> list[float | None]:
        scores = score(hypotheses, references, frequent_words=frequent)
        return [scores.bleu4, scores.chrf]

    values, plain_seconds, ours_seconds = take_turns(plain, ours, arguments.repeats, clock=time.process_time)
    difference = max(abs(one - (other or 0.0)) for one, other in zip(*values, strict=True))
    return {
        "pairs": PAIRS,
        "sacrebleu_seconds": round(plain_seconds, 2),
        "ours_seconds": round(ours_seconds, 2),
        "ratio": round(ours_seconds / plain_seconds, 2),
        "target": f"<= {LARGEST_METRICS_SHARE}",
        "largest_difference": difference,
    }


def take_turns(
    plain: Callable[[], list[Any]],
    ours: Callable[[], list[Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[tuple[list[Any], list[Any]], float, float]:
    """Both results, and the median seconds of either way over rounds in which they take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[list[Any]] = [[], []]
    for _ in range(repeats):
        for way, function in enumerate((plain, ours)):
            start = clock()
            results[way] = function()
            seconds[way].append(clock() - start)
    return (results[0], results[1]), median(seconds[0]), median(seconds[1])


def open_split(model: str, corpus: str | None) -> Split:
    """The test split that the run's own corpus has, or that of another corpus."""
    opened: Corpus = open_corpus(model, recipe_of(model), corpus, is_local_main=True)
    return opened.splits["test"]


def padded_batch(split: Split, indices: range, processor: Any, frames: int) -> Batch:
    """A batch padded to a fixed number of frames."""
    batch = collate(split.read(indices), list(indices), processor.tokenizer, max_target_tokens=512)
    more = frames - batch.poses.shape[1]
    batch.poses = torch.nn.functional.pad(batch.poses, (0, 0, 0, 0, 0, more))
    batch.visible = torch.nn.functional.pad(batch.visible, (0, 0, 0, more))
    batch.frame_mask = torch.nn.functional.pad(batch.frame_mask, (0, more))
    return batch


def make_pairs(count: int) -> tuple[list[str], list[str]]:
    """Sentences of Zipf-distributed words, about seven each, and hypotheses that keep 60 % of them and add others."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(8000)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]

    def sentence() -> str:
        return " ".join(rng.choices(vocabulary, weights, k=max(1, round(rng.gauss(7, 4)))))

    references = [f"{sentence()}." for _ in range(count)]
    kept = (" ".join(word for word in text.split() if rng.random() > 0.4) for text in references)
    return [f"{text} {sentence()}" for text in kept], references


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of what is there: ours beside the plain way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("vs_plain_generate", "Whole split, 5 beams\nclips/s (more is better)", "plain_clips_per_second",
         "ours_clips_per_second", "corpus order,\nHF generate"),
        ("vs_hf_zero3", "ZeRO-3 on two ranks, 5 beams\nclips/s (more is better)", "hf_clips_per_second",
         "ours_clips_per_second", "Seq2SeqTrainer\n.evaluate"),
        ("metrics_vs_sacrebleu", f"{PAIRS:,} pairs\nseconds (less is better)", "sacrebleu_seconds",
         "ours_seconds", "sacreBLEU\nBLEU + chrF++"),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel[0] in results]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), squeeze=False)
    for axis, (key, title, peer, own, peer_name) in zip(axes[0], panels, strict=True):
        values = [results[key][peer], results[key][own]]
        bars = axis.bar([peer_name, "this toolkit\n(all scores)" if key.startswith("m") else "this toolkit"], values,
                        color=["#b8bec6", "#2563a8"], width=0.6)  # fmt: skip
        axis.bar_label(bars, [f"{value:,.1f}" for value in values], padding=2)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
