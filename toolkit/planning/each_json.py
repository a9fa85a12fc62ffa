"""A recipe with each DeepSpeed JSON: the runs that a plan compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.json_file import ds_config_names
from toolkit.recipe.resolve import ResolvedRun, resolve_named


def resolve_with_each(
    name_or_path: str, overrides: Sequence[str], world_size: int, own: str, jsons: Sequence[str] | None = None
) -> dict[str, ResolvedRun | UserError]:
    """A recipe's run on so many GPUs with each DeepSpeed JSON, or why there is none; needs no data.

    Args:
        name_or_path, overrides, world_size: as for ``resolve_named``.
        own: the recipe's own JSON.
        jsons: names; None = the recipe's own and all that are shipped.

    Raises:
        UserError: it goes with none of them.
    """
    runs: dict[str, ResolvedRun | UserError] = {}
    for ds in jsons or dict.fromkeys([own, *ds_config_names()]):
        try:
            runs[ds] = resolve_named(name_or_path, overrides, world_size, has_gpu=True, ds=ds, needs_data=False)
        except UserError as error:
            runs[ds] = error
    if all(isinstance(run, UserError) for run in runs.values()):
        raise next(run for run in runs.values() if isinstance(run, UserError))
    return runs


def copies_of_model(runs: Mapping[str, ResolvedRun | UserError]) -> int:
    """How many copies of the model share out the clips of a step, the same with each JSON."""
    return next(run.data_parallel_size for run in runs.values() if isinstance(run, ResolvedRun))
