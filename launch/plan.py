#!/usr/bin/env python
"""Say what a recipe needs before it runs: memory of every rank, host and disk under each DeepSpeed JSON, the largest
micro-batch that fits, and which JSON to take. It needs no GPU, no weights and no hub.

python launch/plan.py --recipe t5_3b_lora --gpus 8 --gpu-memory 24GiB
python launch/plan.py --recipe t5_large --gpus 16 --nodes 2 --gpu-memory 40GiB --host-memory 256GiB --nvme 1TB
python launch/plan.py --recipe t5_small --gpus 1 --gpu-memory 8GiB --ds zero2 training.micro_batch_size=32
python launch/plan.py --recipe t5_small --tune data.corpus=corpora/mine      try the best of them on this machine

--tune starts each cell, a DeepSpeed JSON with a micro-batch, on all ranks of this machine for some steps, and prints
clips/s and memory, and the command of the fastest. Ctrl-C ends it with what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import require_packages

require_packages()

from toolkit.errors import UserError, exit_code_of, parsed
from toolkit.planning.each_json import copies_of_model, resolve_with_each
from toolkit.planning.hardware import Hardware, parse_size
from toolkit.recipe.load import load_recipe

ALL = ("all", "auto")  # of a plan they are the same: it recommends one of all
OVERRIDES = "Further arguments key=value change the recipe, as for launch/train.py."


def main() -> None:
    arguments = parsed(_parse)
    if arguments.trial:
        _try_on_this_rank(arguments)
    if arguments.tune:
        sys.exit(exit_code_of(lambda: tune(arguments), debug=arguments.debug))
    sys.exit(exit_code_of(lambda: plan(arguments), debug=arguments.debug))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=OVERRIDES
    )
    parser.add_argument(
        "--recipe",
        required="--trial" not in sys.argv,
        metavar="NAME",
        help="a recipe's name or the path of its YAML file",
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of all nodes together (default 1)")
    parser.add_argument("--gpu-memory", default="24GiB", metavar="SIZE", help="memory of each (default 24GiB)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that they are in (default 1)")
    parser.add_argument("--host-memory", metavar="SIZE", help="main memory of each node; not checked without")
    parser.add_argument("--nvme", metavar="SIZE", help="free disk of each node, for offloading")
    parser.add_argument("--ds", default="all", metavar="NAME", help="one DeepSpeed JSON, or all (default), as auto")
    parser.add_argument("--tune", action="store_true", help="try the best of them on this machine, instead of a plan")
    parser.add_argument("--ranks", type=int, metavar="N", help="--tune on so many (default: its GPUs, else two)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="--tune by so many steps each (default 3)")
    parser.add_argument("--trial", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # of --tune, on each rank
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK says the same
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments, rest = parser.parse_known_args()
    if wrong := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    of_trials, of_plans = ("ranks", "steps"), ("gpus", "gpu_memory", "nodes", "host_memory", "nvme")
    unread = of_plans if arguments.tune or arguments.trial else of_trials
    given = [name for name in unread if getattr(arguments, name) != parser.get_default(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{options} {'would have no effect with' if unread is of_plans else 'needs'} --tune")
    if arguments.ranks is not None and arguments.ranks < 1:
        parser.error("--ranks must be at least 1")
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    arguments.overrides = rest
    return arguments


def plan(arguments: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UserError: the hardware is none, no JSON goes with the recipe, or not one clip fits.
    """
    hardware = Hardware(
        gpus=arguments.gpus,
        gpu_memory=parse_size(arguments.gpu_memory, "--gpu-memory"),
        nodes=arguments.nodes,
        host_memory=None if arguments.host_memory is None else parse_size(arguments.host_memory, "--host-memory"),
        nvme=None if arguments.nvme is None else parse_size(arguments.nvme, "--nvme"),
    )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    only = None if arguments.ds in ALL else [arguments.ds]
    runs = resolve_with_each(arguments.recipe, arguments.overrides, hardware.gpus, recipe.deepspeed, only)

    from toolkit.cluster.logs import show_errors_only  # these import torch
    from toolkit.planning.comparison import compare
    from toolkit.planning.subject import Subject
    from toolkit.planning.table import as_dict, as_text
    from toolkit.planning.workload import workload_of

    show_errors_only()
    workload = workload_of(recipe, copies_of_model(runs))
    subject = Subject.of(recipe)
    comparison = compare(subject, runs, hardware, workload, recipe.deepspeed)
    command = [arguments.recipe, *arguments.overrides]
    if arguments.json:
        print(json.dumps(as_dict(comparison, recipe, hardware, workload, command)))
    else:
        print(as_text(comparison, subject, hardware, workload, command))
    if comparison.recommended is None:
        raise comparison.nothing_fits(f"recipe {recipe.name}: not one clip", hardware)


def _try_on_this_rank(arguments: argparse.Namespace) -> None:
    from toolkit.cluster.failures import run_rank
    from toolkit.cluster.ops import use_extensions_dir

    use_extensions_dir()  # before anything imports DeepSpeed

    from toolkit.fitting.trial import take_steps

    run_rank(lambda ranks: take_steps(arguments.trial, ranks), debug=arguments.debug)


def tune(arguments: argparse.Namespace) -> None:
    """Try cells on this machine and print what they do.

    Raises:
        UserError: the recipe is wrong, there is nothing to try, or every cell failed.
    """
    from toolkit.cluster.logs import show_errors_only
    from toolkit.fitting import tuning

    show_errors_only()
    out = sys.stderr if arguments.json else sys.stdout  # standard output holds nothing but the object
    only = None if arguments.ds in ALL else arguments.ds
    ranks, cells = tuning.cells_here(arguments.recipe, arguments.overrides, arguments.ranks, only)
    print(f"{len(cells)} cells of {arguments.steps} steps on {ranks} ranks, each in fresh processes", file=out)
    outcomes = tuning.tune(
        Path(__file__).resolve(),
        arguments.recipe,
        arguments.overrides,
        cells,
        ranks,
        arguments.steps,
        lambda line: print(line, file=out, flush=True),
    )
    described = (outcomes, arguments.recipe, arguments.overrides, ranks)
    print(json.dumps(tuning.as_dict(*described)) if arguments.json else f"\n{tuning.as_text(*described)}")
    if outcomes and tuning.fastest(outcomes) is None:
        raise UserError(
            f"--tune: every cell failed, the first one with: {outcomes[0].problem}",
            "correct what it says, or plan without --tune",
        )


if __name__ == "__main__":
    main()
