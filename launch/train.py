#!/usr/bin/env python
"""Train a translator by a recipe and score it.

deepspeed --num_gpus 8 launch/train.py --recipe t5_3b_lora data.corpus=corpora/mine
deepspeed --num_gpus 8 launch/train.py --recipe my_recipe --ds zero3_offload         another DeepSpeed JSON: less memory
deepspeed --hostfile hosts launch/train.py --recipe my_recipe training.epochs=40     many nodes, one setting changed
python launch/train.py --recipe my_recipe --overfit 8                                new data? first overfit 8 clips

my_recipe is a copy of a recipe that names your clips (launch/recipes.py cp t5_3b_lora my_recipe).

The run directory is runs/RECIPE. The same command resumes a run that was interrupted, and shows the scores of one that
is finished; with --extend and more training.epochs or training.max_steps it trains either one longer.
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
from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.cluster.failures import run_rank
from toolkit.cluster.ranks import Ranks, check_ranks
from toolkit.errors import UserError, parsed

if TYPE_CHECKING:
    from toolkit.recipe.resolve import ResolvedRun


def main() -> None:
    arguments = parsed(parse)
    run_rank(lambda ranks: run(arguments, ranks), debug=arguments.debug)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, metavar="NAME", help="a recipe in recipes/, or a YAML file")
    parser.add_argument(
        "--ds",
        metavar="NAME",
        help="instead of the recipe's DeepSpeed JSON: in ds_configs/, or a file; auto = what the plan recommends for "
        "these GPUs",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|CHECKPOINT",
        help="what to resume: the run's newest complete checkpoint (default), nothing, or the checkpoint named",
    )
    parser.add_argument(
        "--new",
        dest="resume",
        action="store_const",
        const="never",
        help="the same as --resume never: archive an earlier run of this name and train from scratch",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="train a run longer, finished or not, by more training.epochs or training.max_steps; the learning rate "
        "follows the longer schedule from there, and rises to it without a jump",
    )
    parser.add_argument(
        "--overfit", type=int, metavar="CLIPS", help="overfit so many clips, and print whether it worked"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object, last")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the same as LOCAL_RANK
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe: training.epochs=40")
    return parser.parse_intermixed_args()


def resolve(arguments: argparse.Namespace, world_size: int, *, has_gpu: bool) -> ResolvedRun:
    """The run of a command line on so many ranks."""
    from toolkit.recipe.resolve import resolve_named

    overrides = overrides_of(arguments, world_size)
    return resolve_named(arguments.recipe, overrides, world_size, has_gpu=has_gpu, ds=arguments.ds)


def overrides_of(arguments: argparse.Namespace, world_size: int) -> list[str]:
    """The overrides of a command line, after those of ``--overfit``."""
    from toolkit.training.overfit import overfit_overrides

    given: list[str] = arguments.overrides
    if arguments.overfit is None:
        return given
    return [*overfit_overrides(arguments.overfit, world_size, Path(arguments.recipe).stem), *given]


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Check all input before the process group exists, then train."""
    import torch

    from toolkit.batching.glosses import check_glosses
    from toolkit.checkpointing import run_directory, run_lock
    from toolkit.cluster.devices import unseen_gpus
    from toolkit.cluster.ops import check_locks, check_needed_ops
    from toolkit.cluster.rendezvous import on_rank_0
    from toolkit.corpus.mixture.opening import open_corpora
    from toolkit.files import check_place
    from toolkit.fitting.deepspeed_json import AUTO, fit_deepspeed
    from toolkit.fitting.micro_batches import fit_micro_batches
    from toolkit.models.check import check_model
    from toolkit.models.conditions import check_recipe_conditions
    from toolkit.models.vocabulary.needed import check_tokenizer
    from toolkit.models.warm_start.plan import check_warm_start
    from toolkit.scoring.addends import make_bleu
    from toolkit.training.engine import set_allocator
    from toolkit.training.overfit import few_clips
    from toolkit.training.results import format_summary, read_scores
    from toolkit.training.run import train, train_overfit
    from toolkit.training.start import Start, check_corpus, check_selection, extend_schedule, find_start

    def echo(text: str) -> None:
        if ranks.is_main:
            print(text, flush=True)

    gpus = torch.cuda.device_count()
    check_ranks(ranks, gpus=gpus)
    check_locks()
    new = arguments.resume == "never" or arguments.overfit is not None
    decided = list(filter(None, [unseen_gpus()]))
    for note in decided:
        echo(f"note: {note}")
    if arguments.ds == AUTO:
        arguments.ds, reason = fit_deepspeed(
            arguments.recipe, overrides_of(arguments, ranks.world_size), ranks, resumes=not new
        )
        decided.append(f"--ds auto: {arguments.ds}: {reason}")
        echo(decided[-1])
    resolved = resolve(arguments, ranks.world_size, has_gpu=gpus > 0)
    check_needed_ops(resolved.deepspeed)
    on_rank_0(lambda: check_model(resolved))
    set_allocator(resolved)
    for note in resolved.notes:
        echo(f"note: {note}")
    resolved = replace(resolved, notes=(*decided, *resolved.notes))  # log.txt gets them when there is one

    if new and arguments.extend:
        raise UserError(
            "--extend continues a run, but --new and --overfit start one", "leave out --extend, or --new and --overfit"
        )

    def choose_start() -> Start:
        check_place(resolved.run_dir, f"run.dir={resolved.run_dir}", "set run.dir=ANOTHER_FOLDER")
        if (resolved.run_dir / run_directory.STATUS).exists():
            run_lock.claim(resolved.run_dir, echo)
        if not new:
            return find_start(resolved, arguments.resume, extend=arguments.extend)
        run_directory.check_archiving(resolved)
        return Start()

    def check_start() -> tuple[Start, str | None]:
        check_corpus(corpus, None if new else resolved.run_dir, start)
        check_selection(resolved.recipe, corpus)
        evaluation = resolved.recipe.evaluation
        make_bleu(evaluation.tokenize, evaluation.lowercase)  # else the first evaluation would end the run
        check_recipe_conditions(resolved.recipe, corpus)
        check_glosses(resolved.recipe, corpus)
        if start.checkpoint is None and not start.finished:
            check_tokenizer(resolved.recipe)
            if resolved.recipe.model.init_from:
                check_warm_start(resolved.recipe, corpus)
        return start, extend_schedule(resolved, corpus, start)

    # Rank 0 reads for all ranks: on a shared file system others may see the run directory as it was half a minute ago.
    start = on_rank_0(choose_start)
    corpus = open_corpora(resolved.recipe.data, is_local_main=ranks.is_local_main)
    start, extension = on_rank_0(check_start)
    if extension:
        echo(f"note: {extension}")
    if start.finished:
        echo(f"{resolved.run_dir} is finished; --new trains again, --extend with more training.epochs trains longer")
        summary = read_scores(resolved.run_dir) if ranks.is_main else {}
    else:
        if arguments.overfit is not None:
            corpus = few_clips(corpus, arguments.overfit)
        is_short = arguments.overfit is not None
        resolved = fit_micro_batches(resolved, ranks, corpus, echo, resumes=not new, rehearses=not is_short)
        # Last of all: what is wrong leaves the earlier run where it is.
        if new and (archived := on_rank_0(lambda: run_directory.archive_run(resolved.run_dir))):
            echo(f"the run that was in {resolved.run_dir} is now in {archived}")
        # Where no run was there when this start was chosen, another command may have begun one since.
        on_rank_0(lambda: run_lock.claim(resolved.run_dir, echo, patience=0))
        if arguments.overfit is not None:
            summary = train_overfit(resolved, ranks, corpus, echo)
        else:
            summary = train(resolved, ranks, corpus, start, echo)
    if not ranks.is_main:
        return
    if arguments.overfit is None:
        evaluation, seed = resolved.recipe.evaluation, resolved.recipe.training.seed
        echo(f"\n{format_summary(summary, evaluation.samples, seed)}")
    if arguments.json:
        echo(json.dumps(summary))


if __name__ == "__main__":
    main()
