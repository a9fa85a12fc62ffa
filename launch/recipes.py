#!/usr/bin/env python
"""List, show, copy and check recipes. Nothing is trained, downloaded or written but by `cp`.

python launch/recipes.py ls                                          all recipes: model, parameters, DeepSpeed JSON
python launch/recipes.py show t5_small                               with every default filled in
python launch/recipes.py show t5_small --ds zero3 --world-size 8 training.epochs=40
python launch/recipes.py cp t5_small my_recipe                       the start of a recipe of your own
python launch/recipes.py check my_recipe --ds my/zero.json --world-size 8
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import exit_code_of
from toolkit.recipe.catalogue import catalogue, copy_recipe
from toolkit.recipe.model_cards import card_of, tokenizer_of
from toolkit.recipe.paths import shown
from toolkit.recipe.resolve import ResolvedRun, missing_data, resolve_named
from toolkit.recipe.tree import value_at
from toolkit.recipe.yaml_text import dump_yaml

OVERRIDES = (
    "Further arguments key=value change the recipe, e.g. training.epochs=40 model.tiny=true; "
    "ds.KEY=value reaches into the DeepSpeed JSON, e.g. ds.zero_optimization.stage=1."
)


def main() -> None:
    arguments = _parse()
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
    # Overrides may stand anywhere among the options, which argparse does not allow for a list of positionals.
    arguments, rest = parser.parse_known_args()
    wrong = [word for word in rest if word.startswith("-") or arguments.run not in (_show, _check)]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.overrides = rest
    return arguments


def _ls(arguments: argparse.Namespace) -> None:
    entries, problems = catalogue()
    if arguments.json:
        print(json.dumps({"recipes": [entry.to_dict() for entry in entries], "problems": problems}))
        return
    rows = [("recipe", "model", "parameters", "deepspeed", "description")]
    for entry in entries:
        rows.append((entry.name, entry.model, _millions(entry.parameters), entry.deepspeed, entry.description))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, model, size, deepspeed, description in rows:
        print(f"{name:<{wide[0]}}  {model:<{wide[1]}}  {size:>{wide[2]}}  {deepspeed:<{wide[3]}}  {description}")
    for problem in problems:
        print(f"unreadable: {problem}", file=sys.stderr)


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
    run = _resolve(arguments)
    missing = missing_data(run.recipe)
    if arguments.json:
        print(json.dumps({"ok": True, **_to_dict(run), "missing": missing}))
        return
    model, training = run.recipe.model, run.recipe.training
    card = card_of(model)
    weights = "tiny, random weights" if model.tiny else "random weights" if model.from_scratch else "published weights"
    size = f", {_millions(card.parameters)} parameters" if card and not model.tiny else ""
    placement = [f"ZeRO stage {run.zero_stage}", f"{run.precision} parameters"]
    if run.autocast:
        placement.append(f"{run.autocast} products")
    for what, key in (("optimizer states", "offload_optimizer"), ("parameters", "offload_param")):
        device = value_at(run.deepspeed, f"zero_optimization.{key}.device")
        if device not in (None, "none"):
            placement.append(f"{what} on {device}")
    print(f"recipe {run.recipe.name} can run on {_ranks(run)}")
    print(f"  model      {model.backbone}{size}, {weights}, tokenizer {tokenizer_of(model)}")
    print(f"  DeepSpeed  {run.recipe.deepspeed}: {', '.join(placement)}")
    print(
        f"  batch      {training.global_batch_size} clips a step = {run.micro_batch_size} x {run.world_size} ranks x "
        f"{run.accumulation_steps} accumulation steps"
    )
    for line in (*run.notes, *missing):
        print(f"  note       {line}")


def _resolve(arguments: argparse.Namespace) -> ResolvedRun:
    return resolve_named(
        arguments.name,
        arguments.overrides,
        arguments.world_size,
        has_gpu=not arguments.cpu,
        ds=arguments.ds,
        needs_data=False,
    )


def _to_dict(run: ResolvedRun) -> dict[str, object]:
    return {
        "recipe": run.recipe.model_dump(mode="json"),
        "deepspeed": run.deepspeed,
        "world_size": run.world_size,
        "micro_batch_size": run.micro_batch_size,
        "accumulation_steps": run.accumulation_steps,
        "zero_stage": run.zero_stage,
        "precision": run.precision,
        "run_dir": str(run.run_dir),
        "notes": list(run.notes),
    }


def _ranks(run: ResolvedRun) -> str:
    return "1 rank" if run.world_size == 1 else f"{run.world_size} ranks"


def _millions(parameters: int | None) -> str:
    return "from the hub" if parameters is None else f"{parameters / 1e6:,.1f} M"


if __name__ == "__main__":
    main()
