#!/usr/bin/env python
"""Score a model on a corpus, with floors and a control; or compare two sets of translations.

python launch/evaluate.py --model runs/demo                               the corpus of the run, its test splits
python launch/evaluate.py --model runs/demo --corpus corpora/mine --split dev --json
deepspeed --num_gpus 8 launch/evaluate.py --model runs/demo               each rank translates a share
python launch/evaluate.py --model runs/demo evaluation.num_beams=1        one setting changed
python launch/evaluate.py compare A.csv B.csv                             is the difference significant?

Writes predictions (uid, reference, hypothesis, score, chrF++ of each sentence) and scores.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.cluster.ops import use_extensions_dir

use_extensions_dir()  # before anything imports DeepSpeed

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolkit.cluster.failures import run_rank
from toolkit.cluster.ranks import Ranks, check_ranks
from toolkit.errors import UserError, exit_code_of, parsed

if TYPE_CHECKING:
    from toolkit.corpus.packed import Corpus
    from toolkit.evaluation.splits import SplitResult
    from toolkit.recipe.schema import Evaluation
    from toolkit.scoring.neural import NeuralMetrics

PROGRESS_SECONDS = 5.0


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        words = parsed(lambda: parse_comparison(sys.argv[2:]))
        sys.exit(exit_code_of(lambda: compare(words), debug=words.debug))
    arguments = parsed(lambda: parse(sys.argv[1:]))
    run_rank(lambda ranks: run(arguments, ranks), debug=arguments.debug)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a run directory, a model folder or a hub id")
    parser.add_argument("--corpus", metavar="FOLDER", help="a prepared corpus (default: the one of the run)")
    parser.add_argument("--split", metavar="NAMES", help="comma-separated (default: every test split)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: evaluation/ in the run)")
    parser.add_argument("--n-best", type=int, default=1, metavar="N", help="write N texts a clip, with scores")
    parser.add_argument(
        "--zero3", action="store_true", help="partition the weights over the ranks: for a model larger than one device"
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
    from toolkit.evaluation.comparison import compare_files, format_comparison

    first, second = arguments.files
    comparisons = compare_files(first, second, tokenize=arguments.tokenize, lowercase=arguments.lowercase)
    print(format_comparison(first, second, comparisons))
    if arguments.json:
        scores = {name: asdict(item) | {"difference": item.difference} for name, item in comparisons.items()}
        print(json.dumps({"first": first, "second": second, "scores": scores}))


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Everything that can be wrong with the input is found before the process group exists."""
    import torch

    from toolkit.cluster.devices import use_device
    from toolkit.cluster.logs import log_to_file, show_errors_only
    from toolkit.cluster.memory_shortage import explained_shortage
    from toolkit.cluster.process_group import join_process_group, leave_process_group, use_threads
    from toolkit.cluster.rendezvous import on_each_node, on_rank_0
    from toolkit.cpu.allocator import return_freed_memory
    from toolkit.evaluation import inputs
    from toolkit.evaluation.splits import score_splits
    from toolkit.files import check_place
    from toolkit.models.conditions import check_conditions
    from toolkit.models.loading.load import fetch_translator, load_processor
    from toolkit.recipe.prompts import placeholders
    from toolkit.scoring.addends import make_bleu
    from toolkit.scoring.neural import parse_neural

    show_errors_only()
    check_ranks(ranks, gpus=torch.cuda.device_count())
    use_device(ranks)
    on_each_node(lambda: fetch_translator(arguments.model))
    neural = parse_neural(arguments.neural, arguments.neural_python)
    recipe = inputs.recipe_of(arguments.model, arguments.overrides)
    settings = inputs.evaluation_settings(recipe, arguments.overrides)
    make_bleu(settings.tokenize, settings.lowercase)  # raises for an unknown tokenizer
    corpus = inputs.open_corpus(arguments.model, recipe, arguments.corpus, is_local_main=ranks.is_local_main)
    names = inputs.choose_splits(corpus, arguments.split)
    log_to_file(None)
    processor, generation = load_processor(arguments.model)
    inputs.check_fit(corpus, processor)
    check_conditions(placeholders(processor.feature_extractor.prefix_template), corpus, names, processor.tokenizer)
    search = inputs.search_settings(settings, recipe, arguments.overrides, processor.tokenizer)
    ctc_weight = inputs.search_ctc_weight(arguments.model, settings, arguments.overrides)
    beams = search.get("num_beams", generation.num_beams) or 1
    if arguments.n_best > beams:
        raise UserError(
            f"--n-best {arguments.n_best} is more than the {beams} beams of the search",
            f"add evaluation.num_beams={arguments.n_best}",
        )
    out = arguments.out or inputs.default_out_folder(arguments.model, corpus)
    on_rank_0(lambda: check_place(out, f"--out {out}", "give --out ANOTHER_FOLDER"))

    if arguments.zero3 and not torch.cuda.is_available():
        return_freed_memory()
    if ranks.world_size > 1 or arguments.zero3:
        join_process_group(ranks)
    use_threads(ranks)
    clips = {name: len(corpus.splits[name]) for name in names}
    total = sum(clips.values())
    if ranks.is_main:
        print(f"{arguments.model} on {corpus.path}: {', '.join(names)}, {total:,} clips, {beams} beams", flush=True)
    length = search.get("max_new_tokens") or generation.max_new_tokens
    fullest = settings.model_copy(update={"num_beams": beams, "max_new_tokens": length})
    with (
        explained_shortage(
            f"--model {arguments.model}",
            "add evaluation.num_beams=1, a lower evaluation.batch_frames, or --zero3 on more GPUs",
        ),
        open_model(arguments, ranks, corpus, names, fullest) as (model, synced, batch_frames),
    ):
        if ctc_weight is not None:
            model.config.ctc_search_weight = ctc_weight
        started = time.monotonic()
        results = score_splits(
            model,
            processor,
            corpus,
            names,
            settings.model_copy(update={"batch_frames": batch_frames}),
            rank=ranks.rank,
            world_size=ranks.world_size,
            synced=synced,
            n_best=arguments.n_best,
            search=search,
            on_batch=progress_bars(clips, ranks.world_size) if ranks.is_main else None,
        )
        seconds = time.monotonic() - started
    leave_process_group()
    if ranks.is_main:
        report(arguments, corpus, out, results, total / seconds, neural)


@contextmanager
def open_model(
    arguments: argparse.Namespace, ranks: Ranks, corpus: Corpus, names: list[str], settings: Evaluation
) -> Iterator[tuple[Any, bool, int | str]]:
    """Within it the model is loaded, whole on each rank or partitioned over them.

    Yields:
        the model, whether ranks must generate in step, and the padded frames of a generation batch.
    """
    import numpy as np

    from toolkit.cluster.devices import own_device
    from toolkit.evaluation.inputs import kept_batch_frames
    from toolkit.evaluation.splits import ready_to_translate, with_batch_frames
    from toolkit.models.loading.load import load_translator

    frames, most = np.concatenate([corpus.splits[name].frames for name in names]), kept_batch_frames(arguments.model)
    if not arguments.zero3:
        device = own_device()
        model = load_translator(arguments.model)[0].to(device)
        yield model, False, with_batch_frames(settings, model, device, frames, most=most).batch_frames
        return
    from toolkit.decoding.whole_weights import partitioned_engine

    engine = partitioned_engine(arguments.model, ranks.world_size)
    settings = with_batch_frames(settings, engine.module, engine.device, frames, gathers=True, most=most)
    with ready_to_translate(engine, frames, settings) as synced:
        yield engine.module, synced, settings.batch_frames


def report(
    arguments: argparse.Namespace,
    corpus: Corpus,
    out: Path,
    results: dict[str, SplitResult],
    clips_per_second: float,
    neural: NeuralMetrics,
) -> None:
    """Write the results and print them; they are printed also if they cannot be written, and the reverse."""
    from toolkit.evaluation.results import format_results, summarise, write_results

    summary = summarise(arguments.model, corpus, out, results, clips_per_second, neural)
    where = "nothing was written"
    try:
        write_results(out, summary, results)
        where = f"predictions and scores: {out}"
    finally:
        print(f"\n{format_results(results)}\n\n{clips_per_second:.1f} clips/s; {where}")
        for name, split in summary["splits"].items():
            for metric, value in split["neural"].items():
                print(f"{name}: {metric} {value:.4f} ({neural.checkpoints[metric]})")
        if arguments.json:
            print(json.dumps(summary))
        sys.stdout.flush()


def progress_bars(clips: dict[str, int], world_size: int) -> Callable[[str, int], None]:
    """A function that shows on standard error how far each split is, once that takes long.

    Ranks' shares are equal, so rank 0's progress stands for all.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    interval = 0.5 if sys.stderr.isatty() else PROGRESS_SECONDS
    bars = {}

    def show(name: str, done: int) -> None:
        if name not in bars:
            bars[name] = tqdm(total=clips[name], desc=name, unit=" clips", delay=3, mininterval=interval)
        bars[name].update(min(clips[name], done * world_size) - bars[name].n)
        if bars[name].n == clips[name]:
            bars[name].close()

    return show


if __name__ == "__main__":
    main()
