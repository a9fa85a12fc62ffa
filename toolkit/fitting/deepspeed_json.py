"""``--ds auto``: the DeepSpeed JSON that the plan recommends for the hardware that is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.cluster.host_memory import free_host_memory
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange, on_each_node, on_rank_0
from toolkit.errors import UserError
from toolkit.fitting.hardware import cards
from toolkit.planning.comparison import Comparison, Row, compare
from toolkit.planning.each_json import copies_of_model, resolve_with_each
from toolkit.planning.hardware import Hardware
from toolkit.planning.subject import Subject
from toolkit.planning.workload import workload_of
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import RECIPE_FILE
from toolkit.recipe.schema import Recipe

AUTO = "auto"


def fit_deepspeed(name: str, overrides: Sequence[str], ranks: Ranks, *, resumes: bool = True) -> tuple[str, str]:
    """The DeepSpeed JSON to run a recipe with, and why; all ranks call this before they have a process group.

    Args:
        name, overrides: of the recipe.
        ranks: of the run.
        resumes: whether a run that is in the run directory keeps its JSON.

    Raises:
        UserError: the recipe is wrong, or nothing fits; the hint says what to change.
    """
    found = on_each_node(cards)
    free = exchange(min((card.free for card in found), default=None))
    host = min(exchange(free_host_memory()))
    least = None if None in free else min(size for size in free if size is not None)
    return on_rank_0(lambda: choose_json(name, overrides, ranks, least, host, resumes=resumes))


def choose_json(
    name: str, overrides: Sequence[str], ranks: Ranks, gpu_memory: int | None, host_memory: int, *, resumes: bool
) -> tuple[str, str]:
    """As :func:`fit_deepspeed`, for GPUs with so many free bytes; None without GPUs."""
    recipe = load_recipe(name, overrides)
    run_dir = Path(recipe.run.dir or f"runs/{recipe.name}")
    if resumes and (run_dir / RECIPE_FILE).is_file():
        return load_recipe(str(run_dir / RECIPE_FILE)).deepspeed, f"the run in {run_dir} has it"
    if gpu_memory is None:
        return recipe.deepspeed, "the recipe's own: a plan is for GPUs, and none is here"
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    hardware = Hardware(
        gpus=ranks.world_size,
        gpu_memory=gpu_memory,
        nodes=nodes if ranks.world_size % nodes == 0 else 1,
        host_memory=host_memory,
    )
    row, reason = _recommended(compare_jsons(recipe, name, overrides, hardware), recipe, hardware)
    return row.name, f"{reason}, for {hardware.in_words()}"


def compare_jsons(
    recipe: Recipe, name: str, overrides: Sequence[str], hardware: Hardware, jsons: Sequence[str] | None = None
) -> Comparison:
    """The plans of a recipe under some JSONs; None = its own and all that are shipped.

    Raises:
        UserError: it goes with none of them.
    """
    runs = resolve_with_each(name, overrides, hardware.gpus, recipe.deepspeed, jsons)
    workload = workload_of(recipe, copies_of_model(runs))
    return compare(Subject.of(recipe), runs, hardware, workload, recipe.deepspeed)


def _recommended(comparison: Comparison, recipe: Recipe, hardware: Hardware) -> tuple[Row, str]:
    """The recommended row; where the recipe's own micro-batches do not fit there, the fastest in which they do."""
    chosen = comparison.recommended
    if chosen is None:
        raise comparison.nothing_fits(f"--ds auto: not one clip of recipe {recipe.name}", hardware)
    if chosen.fits or recipe.training.micro_batch_size == "auto":
        return chosen, comparison.reason
    fitting = [row for row in comparison.rows if row.fits and row.seconds is not None]
    if not fitting:
        raise UserError(
            f"--ds auto: micro-batches of {recipe.training.micro_batch_size} clips fit with no DeepSpeed JSON on "
            f"{hardware.in_words()}",
            f"set training.micro_batch_size=auto, or at most {chosen.max_micro_batch} with {chosen.name}",
        )
    fastest = min(fitting, key=lambda row: row.seconds or 0.0)
    return fastest, f"the fastest in which micro-batches of {recipe.training.micro_batch_size} clips fit"
