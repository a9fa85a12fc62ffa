#!/usr/bin/env python
"""List, show, copy and check recipes, and see what it takes to train a model. Nothing is trained or downloaded; only
`cp` writes a recipe, and `docs` the tables of docs/models.md.

python launch/recipes.py ls                                          all recipes: model, what trains, DeepSpeed JSON
python launch/recipes.py ls --memory                                 the same with what trains and its states counted
python launch/recipes.py show t5_small                               with every default filled in
python launch/recipes.py show t5_small --ds zero3 --world-size 8 training.epochs=40
python launch/recipes.py cp t5_small my_recipe                       the start of a recipe of your own
python launch/recipes.py check my_recipe --ds my/zero.json --world-size 8
python launch/recipes.py check-model google/mt5-small --card-gib 24 --world-size 2
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.errors import UserError, exit_code_of, parsed
from toolkit.recipe.catalogue import catalogue, copy_recipe, millions, summarise
from toolkit.recipe.corpora import missing_data
from toolkit.recipe.load import load_recipe
from toolkit.recipe.model_cards import card_of, tokenizer_of
from toolkit.recipe.paths import shown
from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.recipe.tree import value_at
from toolkit.recipe.yaml_text import dump_yaml

if TYPE_CHECKING:
    from toolkit.corpus.packed import Corpus

OVERRIDES = (
    "Further arguments key=value change the recipe, e.g. training.epochs=40 model.tiny=true; "
    "ds.KEY=value reaches into the DeepSpeed JSON, e.g. ds.zero_optimization.stage=1."
)


USUAL_GPU = "24GiB"  # as launch/plan.py plans without --gpu-memory
PADDING = {"longest": "the longest clip of each", "ladder": "few lengths (training.padding)"}
_NUMBERS = ("parameters", "trainable", "states")  # columns that are set to the right


def main() -> None:
    arguments = parsed(_parse)
    sys.exit(exit_code_of(lambda: arguments.run(arguments), debug=arguments.debug))


def _parse() -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object")
    resolving = argparse.ArgumentParser(add_help=False)
    resolving.add_argument("name", metavar="NAME", help="a recipe's name (see ls) or the path of its YAML file")
    resolving.add_argument("--ds", metavar="NAME", help="DeepSpeed JSON instead of the recipe's own: name or path")
    resolving.add_argument("--world-size", type=int, default=1, metavar="N", help="number of ranks (default 1)")
    resolving.add_argument("--cpu", action="store_true", help="resolve for ranks on CPUs (default: on GPUs)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", parents=[shared, as_json], help="list the recipes")
    ls.add_argument("--memory", action="store_true", help="count what trains, and the model states on one GPU")
    ls.set_defaults(run=_ls)
    show = commands.add_parser(
        "show", parents=[shared, as_json, resolving], help="print a recipe, fully resolved", epilog=OVERRIDES
    )
    show.set_defaults(run=_show)
    cp = commands.add_parser("cp", parents=[shared], help="copy a recipe as the start of your own")
    cp.add_argument("name", metavar="NAME", help="the recipe to copy")
    cp.add_argument("new", metavar="NEW", help="its new name, or a path that ends in .yaml")
    cp.set_defaults(run=_cp)
    check = commands.add_parser(
        "check",
        parents=[shared, as_json, resolving],
        help="say whether a recipe can run; exit code 2 if not",
        epilog=OVERRIDES,
    )
    check.set_defaults(run=_check)
    model = commands.add_parser(
        "check-model",
        parents=[shared, as_json],
        help="say whether a model of the hub or a folder can be trained here, and what it takes",
        epilog=OVERRIDES,
    )
    model.add_argument("name", metavar="MODEL", help="a model card's name, a hub id, or a folder in HuggingFace form")
    model.add_argument("--card-gib", type=float, default=24.0, metavar="G", help="memory of a GPU in GiB (default 24)")
    model.add_argument("--world-size", type=int, default=1, metavar="N", help="number of GPUs (default 1)")
    model.set_defaults(run=_check_model)
    docs = commands.add_parser("docs", parents=[shared], help="update the tables of docs/models.md")
    docs.set_defaults(run=_docs)
    # Overrides may stand anywhere among the options, which argparse does not allow for a list of positionals.
    arguments, rest = parser.parse_known_args()
    wrong = [word for word in rest if word.startswith("-") or arguments.run not in (_show, _check, _check_model)]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.overrides = rest
    return arguments


def _ls(arguments: argparse.Namespace) -> None:
    recipes, problems = catalogue()
    entries = [summarise(recipe) for recipe in recipes]
    rows = [[entry.name, entry.model, millions(entry.parameters), entry.trains, entry.deepspeed] for entry in entries]
    headings = ["recipe", "model", "parameters", "trains", "deepspeed"]
    shown = [asdict(entry) for entry in entries]
    if arguments.memory:
        from toolkit.planning.overview import overview  # it imports torch

        _keep_libraries_quiet()

        counted = [overview(recipe) for recipe in recipes]
        shown = [entry | asdict(one) for entry, one in zip(shown, counted, strict=True)]
        rows = [[*row, millions(one.trainable), one.states] for row, one in zip(rows, counted, strict=True)]
        headings += ["trainable", "states"]
    if arguments.json:
        print(json.dumps({"recipes": shown, "problems": [problem.lines for problem in problems]}))
        return
    wide = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row, last in zip([headings, *rows], ["description", *(entry.description for entry in entries)], strict=True):
        cells = [
            f"{cell:>{width}}" if heading in _NUMBERS else f"{cell:<{width}}"
            for heading, cell, width in zip(headings, row, wide, strict=True)
        ]
        print("  ".join([*cells, last]))
    if arguments.memory:
        print("\nstates: model states on one GPU, estimated by arithmetic; activations come on top")
    for problem in problems:
        print(f"unreadable: {problem.lines}", file=sys.stderr)


def _show(arguments: argparse.Namespace) -> None:
    run = _resolve(arguments)
    if arguments.json:
        print(json.dumps(_to_dict(run)))
        return
    print(f"# recipe {run.recipe.name}, every default filled in")
    print(dump_yaml(run.recipe.model_dump(mode="json")))
    print(f"# DeepSpeed JSON {run.recipe.deepspeed}, as DeepSpeed gets it on {_ranks(run)}")
    print(json.dumps(run.deepspeed, indent=2))


def _cp(arguments: argparse.Namespace) -> None:
    path = shown(copy_recipe(arguments.name, arguments.new))
    print(f"{path} is a copy of {arguments.name}; edit it, then: python launch/recipes.py check {arguments.new}")


def _check(arguments: argparse.Namespace) -> None:
    from toolkit.corpus.mixture.leakage import leakage_notes
    from toolkit.corpus.mixture.opening import open_prepared
    from toolkit.corpus.plan import landmarks_of

    _keep_libraries_quiet()

    run = _resolve(arguments)
    corpus = open_prepared(run.recipe.data) if run.recipe.data.corpora or run.recipe.model.init_from else None
    if corpus is None and not run.recipe.data.corpus:
        landmarks_of(run.recipe.data)
    missing = [f"{problem.message}: {problem.hint}" for problem in missing_data(run.recipe)]
    taken, drawn, vocabulary = _warm_start(run, corpus), _mixture(run, corpus), _vocabulary(run)
    shared = leakage_notes(corpus) if corpus else []
    if arguments.json:
        lines = {"missing": missing, "init_from": taken, "corpora": drawn, "leakage": shared}
        print(json.dumps({"ok": True, **_to_dict(run), **lines, "vocabulary": vocabulary or None}))
        return
    model = run.recipe.model
    card = card_of(model)
    weights = "tiny, random weights" if model.tiny else "random weights" if model.from_scratch else "published weights"
    weights = weights if model.init_from is None else "tiny" if model.tiny else f"weights from {model.init_from}"
    size = f", {millions(card.parameters)} parameters" if card and not model.tiny else ""
    placement = [f"ZeRO stage {run.zero_stage}", f"{run.precision} parameters"]
    if run.autocast:
        placement.append(f"{run.autocast} products")
    for what, key in (("optimizer states", "offload_optimizer"), ("parameters", "offload_param")):
        device = value_at(run.deepspeed, f"zero_optimization.{key}.device")
        if device not in (None, "none"):
            placement.append(f"{what} on {device}")
    print(f"recipe {run.recipe.name} can run on {_ranks(run)}")
    print(f"  model      {model.backbone}{size}, {weights}, tokenizer {tokenizer_of(model)}")
    if vocabulary:
        print(f"  vocabulary {vocabulary}")
    print(f"  DeepSpeed  {run.recipe.deepspeed}: {', '.join(placement)}")
    print(f"  batch      a step of {run.batch}, padded to {PADDING[run.padding]}")
    if run.recipe.training.micro_batch_size == "auto" and not arguments.cpu:
        print(f"  plan       {_planned_micro_batch(run)}")
    print(f"  memory     {_memory(run)}")
    for line in drawn:
        print(f"  corpora    {line}")
    for line in taken:
        print(f"  init_from  {line}")
    for line in (*run.notes, *shared, *missing):
        print(f"  note       {line}")


def _warm_start(run: ResolvedRun, corpus: Corpus | None) -> list[str]:
    """What the run will take of a trained translator, a line a part; empty where it starts from none."""
    if run.recipe.model.init_from is None:
        return []
    from toolkit.models.warm_start.plan import check_warm_start

    return list(check_warm_start(run.recipe, corpus).lines())


def _mixture(run: ResolvedRun, corpus: Corpus | None) -> list[str]:
    """What an epoch draws of each of several corpora, where they are prepared."""
    if corpus is None or not run.recipe.data.corpora:
        return []
    from toolkit.batching.epochs import mixture_of
    from toolkit.training.start import check_corpus, check_selection

    check_corpus(corpus, None)
    check_selection(run.recipe, corpus)
    return mixture_of(corpus.splits["train"], run.recipe).lines()


def _vocabulary(run: ResolvedRun) -> str:
    """How many tokens the run will keep, in words; empty where it keeps all.

    Raises:
        UserError: the tokenizer is here and cannot be trimmed.
    """
    if run.recipe.model.vocabulary == "full":
        return ""
    from toolkit.planning.costs.vocabulary import planned_vocabulary

    return planned_vocabulary(run.recipe).what


def _check_model(arguments: argparse.Namespace) -> None:
    from toolkit.planning.candidates import describe_candidate, examine

    _keep_libraries_quiet()

    if arguments.world_size < 1 or not arguments.card_gib > 0:
        raise UserError(
            f"--world-size {arguments.world_size} --card-gib {arguments.card_gib:g}: both are above 0",
            "give e.g. --world-size 1 --card-gib 24",
        )
    recipe = load_recipe("t5_small", [f"model.backbone={arguments.name}", *arguments.overrides])
    candidate = examine(recipe, arguments.card_gib, arguments.world_size)
    if arguments.json:
        print(json.dumps(candidate.to_dict()))
        return
    for line in describe_candidate(candidate, arguments.card_gib, arguments.world_size):
        print(line)


def _docs(arguments: argparse.Namespace) -> None:
    from toolkit.planning.tables import write_tables

    _keep_libraries_quiet()

    path = Path(__file__).resolve().parents[1] / "docs" / "models.md"
    write_tables(path)
    print(f"{shown(path)}: tables updated")


def _keep_libraries_quiet() -> None:
    """PEFT imports bitsandbytes, which warns of a missing kernel on processors that know bf16."""
    from toolkit.cluster.logs import show_errors_only  # it imports transformers

    show_errors_only()


def _resolve(arguments: argparse.Namespace) -> ResolvedRun:
    return resolve_named(
        arguments.name,
        arguments.overrides,
        arguments.world_size,
        has_gpu=not arguments.cpu,
        ds=arguments.ds,
        needs_data=False,
    )


def _memory(run: ResolvedRun) -> str:
    from toolkit.planning.costs.counts import count, weights_of_rank
    from toolkit.planning.costs.zero import zero_memory
    from toolkit.planning.hardware import GIB

    try:
        weights = weights_of_rank(count(run.recipe).weights, run.tensor_parallel_size)
        states = zero_memory(weights, run.recipe, run.deepspeed, run.data_parallel_size)
    except UserError as error:
        return f"not estimated: {error.message} ({error.hint})"
    host = f", and {states.host / GIB:.1f} GiB of host memory a rank" if states.host else ""
    terms = sorted(states.states.items(), key=lambda item: -item[1])
    listed = " + ".join(f"{size / GIB:.2f} {name}" for name, size in terms if size >= GIB / 100)
    activations = f"activations come on top: python launch/plan.py --recipe {run.recipe.name}"
    return f"a GPU, by arithmetic: {listed} = {states.device / GIB:.1f} GiB of model states{host}; {activations}"


def _planned_micro_batch(run: ResolvedRun) -> str:
    """How many clips the plan finds to fit into a forward pass on the GPUs that plan.py assumes."""
    from toolkit.planning.hardware import Hardware, parse_size
    from toolkit.planning.plan import largest_micro_batch
    from toolkit.planning.subject import Subject
    from toolkit.planning.workload import workload_of

    hardware = Hardware(gpus=run.world_size, gpu_memory=parse_size(USUAL_GPU, "--gpu-memory"))
    more = f"python launch/plan.py --recipe {run.recipe.name} --gpu-memory SIZE plans others"
    try:
        workload = workload_of(run.recipe, run.data_parallel_size)
        largest = largest_micro_batch(Subject.of(run.recipe), run, hardware, workload)
    except UserError as error:
        return f"not made: {error.message} ({error.hint})"
    if not largest:
        return f"not one clip fits GPUs of {USUAL_GPU}; {more}"
    return f"micro-batches of at most {largest} clips fit GPUs of {USUAL_GPU}; {more}"


def _to_dict(run: ResolvedRun) -> dict[str, object]:
    return {
        "recipe": run.recipe.model_dump(mode="json"),
        "deepspeed": run.deepspeed,
        "world_size": run.world_size,
        "micro_batch_size": run.micro_batch_size,
        "accumulation_steps": run.accumulation_steps,
        "padding": run.padding,
        "zero_stage": run.zero_stage,
        "precision": run.precision,
        "run_dir": str(run.run_dir),
        "notes": list(run.notes),
    }


def _ranks(run: ResolvedRun) -> str:
    return "1 rank" if run.world_size == 1 else f"{run.world_size} ranks"


if __name__ == "__main__":
    main()
