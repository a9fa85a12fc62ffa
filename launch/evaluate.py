#!/usr/bin/env python
"""Score a model on a corpus, beside what one scores without watching; or two sets of translations against each other.

python launch/evaluate.py --model runs/demo                               the corpus of the run, its test splits
python launch/evaluate.py --model runs/demo --corpus corpora/mine --split dev --json
deepspeed --num_gpus 8 launch/evaluate.py --model runs/demo               clips are dealt out over the ranks
python launch/evaluate.py --model runs/demo evaluation.num_beams=1        one setting changed
python launch/evaluate.py compare A.csv B.csv                             which one is better, or is it chance?

Writes predictions (uid, reference, hypothesis, score, chrF++ of each sentence) and scores.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.cluster.ops import use_extensions_dir

use_extensions_dir()  # before anything imports DeepSpeed

import argparse
import json
import time
from dataclasses import asdict

from toolkit.cluster.failures import run_rank
from toolkit.cluster.ranks import Ranks, check_ranks
from toolkit.errors import UserError, exit_code_of

PROGRESS_SECONDS = 5.0


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        words = parse_comparison(sys.argv[2:])
        sys.exit(exit_code_of(lambda: compare(words), debug=words.debug))
    arguments = parse(sys.argv[1:])
    run_rank(lambda ranks: run(arguments, ranks), debug=arguments.debug)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a run directory, a model folder or a hub id")
    parser.add_argument("--corpus", metavar="FOLDER", help="a prepared corpus (default: the one of the run)")
    parser.add_argument("--split", metavar="NAMES", help="comma-separated (default: every test split)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: evaluation/ in the run)")
    parser.add_argument("--n-best", type=int, default=1, metavar="N", help="write so many texts a clip, with scores")
    parser.add_argument(
        "--zero3", action="store_true", help="cut the weights over the ranks: for a model larger than one device"
    )
    parser.add_argument(
        "--neural",
        nargs="+",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="learnt metrics, where installed: comet, bleurt",
    )
    parser.add_argument(
        "--neural-python", metavar="PYTHON", help="the python of the environment that has them (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object, last")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK says the same
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings: evaluation.num_beams=1")
    arguments = parser.parse_intermixed_args(words)
    if arguments.n_best < 1:
        parser.error("--n-best must be at least 1")
    return arguments


def parse_comparison(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py compare", description="Paired bootstrap test of two prediction files of the same clips."
    )
    parser.add_argument("files", nargs=2, metavar="PREDICTIONS.csv")
    parser.add_argument("--tokenize", default="13a", metavar="NAME", help="sacreBLEU tokenizer (default 13a)")
    parser.add_argument("--lowercase", action="store_true", help="compare lower-cased texts")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(words)


def compare(arguments: argparse.Namespace) -> None:
    from toolkit.evaluation.evaluate import compare_files, format_comparison

    first, second = arguments.files
    comparisons = compare_files(first, second, tokenize=arguments.tokenize, lowercase=arguments.lowercase)
    print(format_comparison(first, second, comparisons))
    if arguments.json:
        scores = {name: asdict(item) | {"difference": item.difference} for name, item in comparisons.items()}
        print(json.dumps({"first": first, "second": second, "scores": scores}))


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Whatever can be wrong with the input is found before the process group exists."""
    import numpy as np
    import torch

    from toolkit.cluster.devices import use_device
    from toolkit.cluster.logs import log_to_file
    from toolkit.cluster.process_group import join_process_group, leave_process_group, use_threads
    from toolkit.cluster.rendezvous import on_each_node
    from toolkit.decoding.whole_weights import cut, whole_weights
    from toolkit.evaluation.evaluate import (
        check_fit,
        choose_splits,
        default_out_folder,
        evaluation_settings,
        format_results,
        open_corpus,
        recipe_of,
        write_results,
    )
    from toolkit.evaluation.splits import score_splits
    from toolkit.models.loading.load import fetch_translator, load_translator
    from toolkit.models.tokenizers import language_id
    from toolkit.planning.memory import fits_whole
    from toolkit.scoring.metrics import score
    from toolkit.scoring.neural import parse_neural

    def echo(text: str) -> None:
        if ranks.is_main:
            print(text, flush=True)

    check_ranks(ranks, gpus=torch.cuda.device_count())
    device = use_device(ranks)
    on_each_node(lambda: fetch_translator(arguments.model))
    neural = parse_neural(arguments.neural, arguments.neural_python)
    recipe = recipe_of(arguments.model, arguments.overrides)
    settings = evaluation_settings(recipe, arguments.overrides)
    score([], [], tokenize=settings.tokenize)  # an unknown tokenizer is better known now than after an hour
    corpus = open_corpus(arguments.model, recipe, arguments.corpus, is_local_main=ranks.is_local_main)
    names = choose_splits(corpus, arguments.split)
    log_to_file(None)
    model, processor = load_translator(arguments.model)
    check_fit(corpus, processor)
    search = {
        name: getattr(settings, name)
        for name in ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens")
    }
    if recipe is None:
        # A folder by itself knows how to search; only what was asked for changes that.
        asked = {item.split("=")[0].removeprefix("evaluation.") for item in arguments.overrides}
        search = {name: value for name, value in search.items() if name in asked}
    if settings.forced_language:
        search["forced_bos_token_id"] = language_id(processor.tokenizer, settings.forced_language)
    beams = search.get("num_beams", model.generation_config.num_beams) or 1
    if arguments.n_best > beams:
        raise UserError(f"--n-best {arguments.n_best} needs as many beams: add evaluation.num_beams={arguments.n_best}")
    out = arguments.out or default_out_folder(arguments.model, corpus)

    if ranks.world_size > 1 or arguments.zero3:
        join_process_group(ranks)
    use_threads(ranks)
    total = sum(len(corpus.splits[name]) for name in names)
    echo(f"{arguments.model} on {corpus.path}: {', '.join(names)}, {total:,} clips, {beams} beams")
    started = time.monotonic()
    progress = Progress(corpus, ranks) if ranks.is_main else None
    how = {"rank": ranks.rank, "world_size": ranks.world_size, "n_best": arguments.n_best, "on_batch": progress}
    if arguments.zero3:
        engine = cut(model, ranks.world_size)
        gather = fits_whole(
            engine,
            frames=np.concatenate([corpus.splits[name].frames for name in names]),
            batch_frames=settings.batch_frames,
            beams=beams,
            max_new_tokens=search.get("max_new_tokens") or model.generation_config.max_new_tokens,
        )
        with whole_weights(engine, gather=gather) as synced:
            results = score_splits(
                engine.module, processor, corpus, names, settings, search=search, synced=synced, **how
            )
    else:
        results = score_splits(model.to(device), processor, corpus, names, settings, search=search, **how)
    seconds = time.monotonic() - started
    leave_process_group()
    if not ranks.is_main:
        return
    summary = write_results(out, arguments.model, corpus, results, total / seconds, neural)
    echo(f"\n{format_results(results)}\n\n{total / seconds:.1f} clips/s; predictions and scores: {out}")
    for name, split in summary["splits"].items():
        for metric, value in split["neural"].items():
            echo(f"{name}: {metric} {value:.4f} ({neural.checkpoints[metric]})")
    if arguments.json:
        echo(json.dumps(summary))


class Progress:
    """Says on standard error every few seconds how far a long evaluation is; a short one passes in silence."""

    def __init__(self, corpus: object, ranks: Ranks) -> None:
        self.corpus = corpus
        self.ranks = ranks
        self.started = self.spoke = time.monotonic()
        self.name = ""

    def __call__(self, name: str, done: int) -> None:
        now = time.monotonic()
        if name != self.name:
            self.name, self.started = name, self.spoke
        if now - self.spoke < PROGRESS_SECONDS:
            return
        self.spoke = now
        total = len(self.corpus.splits[name])  # type: ignore[attr-defined]
        # Ranks get equal shares, so this one's speaks for all.
        everywhere = min(total, done * self.ranks.world_size)
        rate = everywhere / (now - self.started)
        left = (total - everywhere) / rate
        print(
            f"{name}: {everywhere:,} of {total:,} clips, {rate:.1f} clips/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
