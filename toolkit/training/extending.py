"""Making a run longer: which part of the schedule it goes on with, and whether there is anything left to do."""

from __future__ import annotations

from toolkit.batching.order import steps_per_epoch
from toolkit.checkpointing.run_directory import is_to_be_extended
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Recipe
from toolkit.training.optimization.schedules import extended, total_steps
from toolkit.training.run import Start


def extend_schedule(resolved: ResolvedRun, corpus: Corpus, start: Start) -> str | None:
    """Let a run that goes on from a checkpoint of a shorter one follow the longer schedule; see ``schedules.py``.

    Args:
        resolved: the run.
        corpus: what it learns from.
        start: its progress gets the extension.

    Returns:
        what the user should know; None where the run is as long as it was.

    Raises:
        UserError: it would be shorter, or would end at once.
    """
    if start.state is None:
        return None
    training, progress = resolved.recipe.training, start.progress
    epoch_steps = steps_per_epoch(len(corpus.splits["train"]), training.global_batch_size)
    before = total_steps(Recipe.model_validate(start.state.recipe).training, epoch_steps)
    after = total_steps(training, epoch_steps)
    if after < before:
        raise UserError(
            f"{start.checkpoint} is of a run of {before} steps, of which {progress.step} are done, and training.epochs "
            f"and training.max_steps would end it after {after}: a run can only be made longer"
        )
    if is_to_be_extended(resolved):
        if progress.step >= after:
            raise UserError(
                f"there is nothing to --extend: {resolved.run_dir} has done all of its {after} steps; raise "
                "training.epochs, and training.max_steps where it is set"
            )
        if training.early_stopping is not None and progress.evaluations_since_best >= training.early_stopping:
            raise UserError(
                f"there is nothing to --extend: {resolved.run_dir} has stopped early, after "
                f"{progress.evaluations_since_best} evaluations without a better one; raise training.early_stopping, "
                "or set it to null"
            )
    if after == before:
        return None
    progress.extension = extended(training, progress.step, before, after, progress.extension)
    return (
        f"the run is extended from {before} to {after} steps; from step {progress.step} on the learning rate is that "
        "of the longer schedule, to which it rises as in a warm-up"
    )
