"""Where a run starts: from scratch, from a verified checkpoint, or not at all; and whether its corpus is the same.

Must not need a process group: rank 0 decides, and the other ranks receive its decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from toolkit.batching.epochs import epoch_steps
from toolkit.checkpointing import run_directory
from toolkit.checkpointing.checkpoints import Progress, SavedState, choose_checkpoint, read_state
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.evaluation.inputs import check_fit
from toolkit.models import PoseProcessor
from toolkit.poses.features import NORMALISATION
from toolkit.recipe.batches import total_steps
from toolkit.recipe.corpora import ALL, MEAN
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Recipe
from toolkit.training.optimization.schedules import extended


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    progress: Progress = field(default_factory=Progress)  # how far the run has come
    checkpoint: Path | None = None  # folder to resume from; None to train from scratch
    state: SavedState | None = None  # what that checkpoint says
    finished: bool = False  # whether the run has its scores already


def find_start(resolved: ResolvedRun, wanted: str, *, extend: bool = False) -> Start:
    """Read the run directory and verify the checkpoint: one at a path, or the newest one for ``auto``.

    With ``extend`` the run may become longer; see :func:`extend_schedule`.

    Raises:
        UserError: the directory holds another run; the checkpoint is damaged or of another experiment; there is
            nothing to extend.
    """
    if wanted == "auto":
        run_directory.forget_failed_start(resolved.run_dir)
    run_directory.check_same_run(resolved, extend=extend)
    status = run_directory.read_status(resolved.run_dir)
    is_finished = wanted == "auto" and status == "finished"
    if is_finished and not (extend and run_directory.is_to_be_extended(resolved)):
        return Start(finished=True)
    checkpoint = choose_checkpoint(resolved.run_dir / run_directory.CHECKPOINTS, wanted)
    if checkpoint is None:
        if is_finished:
            raise UserError(
                f"--extend: {resolved.run_dir} is finished and has no checkpoint left to resume from",
                "train the longer run from scratch with --new",
            )
        if extend and status is None:
            raise UserError(
                f"--extend: {resolved.run_dir} holds no run",
                "leave --extend out to start a run, or name the folder of the one to extend: run.dir=FOLDER",
            )
        return Start()
    state = read_state(checkpoint)
    # A run that was being extended and has saved nothing since resumes from a checkpoint of the shorter one.
    run_directory.check_same_experiment(resolved, state.recipe, checkpoint, extend=extend or status is not None)
    return Start(state.progress, checkpoint, state)


def check_corpus(corpus: Corpus, run_dir: Path | None, start: Start | None = None) -> None:
    """Refuse a corpus without training clips, or another one than the run was started with.

    ``run_dir`` is that of a run that is resumed, None for a new one; ``start`` is where it resumes from, if anywhere.

    Raises:
        UserError: there are no training clips; the features differ from those of this toolkit's models, or of the
            run; the checkpoint was trained on other clips.
    """
    if "train" not in corpus.splits or not len(corpus.splits["train"]):
        raise UserError(
            f"the corpus {corpus.path} has no training clips (its splits: {', '.join(corpus.splits) or 'none'})",
            "write train into the split column of its table for the clips to train on, and prepare it again",
        )
    if corpus.metadata.normalisation != NORMALISATION:
        raise UserError(
            f"the corpus {corpus.path} has features with normalisation '{corpus.metadata.normalisation}', "
            f"but models read features with '{NORMALISATION}'",
            "prepare it again with launch/prepare.py",
        )
    if run_dir and (run_dir / run_directory.PROCESSOR).is_dir():
        try:
            check_fit(corpus, PoseProcessor.from_pretrained(run_dir / run_directory.PROCESSOR))
        except UserError as error:
            raise UserError(
                f"{run_dir}: {error.message}",
                "prepare the corpus with the settings of that run, or train from scratch with --new or another run.dir",
            ) from error
    if run_dir:
        run_directory.check_same_corpus(corpus, run_dir)
    if start and start.state and not run_directory.is_same_corpus(start.state.corpus, corpus):
        raise UserError(
            f"{start.checkpoint} was trained on other clips than those of {corpus.path}",
            "resume with the corpus that it was trained on, or train from scratch with --new",
        )


def check_selection(recipe: Recipe, corpus: Corpus) -> None:
    """Raise UserError where the corpus whose scores pick the best model has no dev clips."""
    chosen, dev = recipe.evaluation.select_corpus, corpus.splits.get("dev")
    named = [part.corpus for part in dev.parts] if dev else []
    if chosen not in (MEAN, ALL, *named):
        raise UserError(
            f"evaluation.select_corpus={chosen} has no dev clips in this mix",
            f"set it to one of {', '.join([MEAN, ALL, *named])}",
        )


def extend_schedule(resolved: ResolvedRun, corpus: Corpus, start: Start) -> str | None:
    """Let a run that resumes from a checkpoint of a shorter one follow the longer schedule (``schedules.py``).

    The progress of ``start`` gets the extension. Returns a note for the user, None where the run keeps its length.

    Raises:
        UserError: the run would become shorter, or would end at once.
    """
    if start.state is None:
        return None
    training, progress = resolved.recipe.training, start.progress
    of_epoch = epoch_steps(corpus.splits["train"], resolved.recipe)
    before = total_steps(Recipe.model_validate(start.state.recipe).training, of_epoch)
    after = total_steps(training, of_epoch)
    if after < before:
        raise UserError(
            f"training.epochs and training.max_steps end the run after {after} steps, but {start.checkpoint} is at "
            f"step {progress.step} of {before}: a run can only become longer",
            "raise training.epochs, and training.max_steps where it is set",
        )
    if run_directory.is_to_be_extended(resolved):
        if progress.step >= after:
            raise UserError(
                f"--extend: {resolved.run_dir} has already done all of its {after} steps",
                "raise training.epochs, and training.max_steps where it is set",
            )
        if training.early_stopping is not None and progress.evaluations_since_best >= training.early_stopping:
            raise UserError(
                f"--extend: {resolved.run_dir} stopped early after {progress.evaluations_since_best} evaluations "
                f"without improvement, training.early_stopping={training.early_stopping}",
                "raise training.early_stopping, or set it to null",
            )
    if after == before:
        return None
    progress.extension = extended(training, progress.step, before, after, progress.extension)
    return (
        f"the run is extended from {before} to {after} steps; from step {progress.step} on the learning rate follows "
        "the longer schedule, and first rises to it as in a warm-up"
    )
