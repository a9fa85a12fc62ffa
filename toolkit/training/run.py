"""A whole run, from a resolved recipe to its scores."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from toolkit.checkpointing import run_directory
from toolkit.checkpointing.checkpoints import (
    Progress,
    SavedState,
    archive_newer,
    choose_checkpoint,
    complete_checkpoints,
    read_state,
)
from toolkit.checkpointing.kept_models import Kept, restore_models
from toolkit.checkpointing.random_states import seed_everything
from toolkit.checkpointing.reader import load_checkpoint
from toolkit.checkpointing.writer import CheckpointWriter
from toolkit.cluster import failures
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.process_group import join_process_group, leave_process_group, use_threads
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import join_rendezvous, on_each_node, on_rank_0
from toolkit.cluster.swap_files import claim_swap_folders, remove_swap_folders, swap_to_this_node
from toolkit.corpus.packed import Corpus
from toolkit.errors import Interrupted, UserError
from toolkit.evaluation.evaluate import check_fit
from toolkit.evaluation.splits import splits_to_test
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.build import build_translator, fetch_backbone
from toolkit.models.loading.weights import count_weights
from toolkit.models.tokenizers import find_unknown_characters
from toolkit.poses.features import NORMALISATION
from toolkit.recipe.paths import BEST
from toolkit.recipe.resolve import ResolvedRun
from toolkit.reporting.report import write_report
from toolkit.tracking.tracker import open_tracker
from toolkit.training.engine import make_engine
from toolkit.training.final_scores import score_best
from toolkit.training.loading import all_batches
from toolkit.training.monitoring.communication import tell_communication
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.monitoring.metering import peak_memory_gib
from toolkit.training.overfit import TARGET_LOSS, verdict
from toolkit.training.processor import PROCESSOR, shared_processor
from toolkit.training.results import write_scores
from toolkit.training.trainer import Trainer
from toolkit.training.truncated_texts import warn_of_cut_texts

log = logging.getLogger("toolkit")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """How a run begins: afresh, from a verified checkpoint, or not at all."""

    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    state: SavedState | None = None  # of the checkpoint
    finished: bool = False  # it has its scores already


def find_start(resolved: ResolvedRun, wanted: str, *, extend: bool = False) -> Start:
    """Look at the run directory and verify the checkpoint, before any process group exists; one rank does so for all.

    Args:
        resolved: the run.
        wanted: "auto" for the newest complete checkpoint of the run, or the path of one.
        extend: whether the run is to be longer than it was; see ``extending.py``.

    Raises:
        UserError: another run lives there; the checkpoint is damaged or of another experiment; there is nothing to
            extend.
    """
    run_directory.check_same_run(resolved, extend=extend)
    status = run_directory.read_status(resolved.run_dir)
    is_finished = wanted == "auto" and status == "finished"
    if is_finished and not (extend and run_directory.is_to_be_extended(resolved)):
        return Start(finished=True)
    checkpoint = choose_checkpoint(resolved.run_dir / "checkpoints", wanted)
    if checkpoint is None:
        if is_finished:
            raise UserError(f"{resolved.run_dir} has no checkpoint left from which --extend could go on")
        if extend and status is None:
            raise UserError(f"{resolved.run_dir} holds no run to --extend: leave it out, or name the run by run.dir")
        return Start()
    state = read_state(checkpoint)
    # A run that was being extended, and has saved nothing since, goes on from a checkpoint of the shorter one.
    run_directory.check_same_experiment(resolved, state.recipe, checkpoint, extend=extend or status is not None)
    return Start(state.progress, checkpoint, state)


def check_corpus(corpus: Corpus, run_dir: Path | None, start: Start | None = None) -> None:
    """Refuse a corpus from which nothing can be learnt, or not what a run began to learn; one rank looks for all.

    Args:
        corpus: what is to be learnt.
        run_dir: of the run that goes on; None for one that begins anew.
        start: where it goes on from, if anywhere.

    Raises:
        UserError: it has no training clips; its features are of another kind than this toolkit's models read, or than
            the run has been trained on so far; the checkpoint has seen other clips.
    """
    if "train" not in corpus.splits or not len(corpus.splits["train"]):
        raise UserError(
            f"the corpus {corpus.path} has no training clips (its splits: {', '.join(corpus.splits) or 'none'}): "
            "write train into the split column of its table for the clips to learn from, and prepare it again"
        )
    if corpus.metadata.normalisation != NORMALISATION:
        raise UserError(
            f"the features of the corpus {corpus.path} were normalised by '{corpus.metadata.normalisation}', and "
            f"models here read poses by '{NORMALISATION}': prepare it with launch/prepare.py"
        )
    if run_dir and (run_dir / PROCESSOR).is_dir():
        try:
            check_fit(corpus, PoseProcessor.from_pretrained(run_dir / PROCESSOR))
        except UserError as error:
            raise UserError(f"{run_dir}: {error}; or start anew with --new or another run.dir") from error
    if run_dir:
        run_directory.check_same_corpus(corpus, run_dir)
    if start and start.state and not run_directory.is_same_corpus(start.state.corpus, corpus):
        raise UserError(
            f"{start.checkpoint} was saved while learning from other clips than those of {corpus.path}: go on with the "
            "corpus that it was saved with, or start anew with --new"
        )


def train(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, start: Start, echo: Say) -> dict[str, Any]:
    """Train, or go on training, and score the best model on every test split.

    All ranks call this. Afterwards the run directory holds everything.

    Args:
        resolved: the run.
        ranks: which rank this is.
        corpus: what it learns from.
        start: from :func:`find_start`.
        say: prints a line on one rank, nothing on the others.

    Returns:
        what ``scores.json`` says, on rank 0; an empty dict elsewhere.

    Raises:
        Interrupted: asked to stop; everything is saved.
        UserError: a guard stopped the run.
    """
    with (
        closing(all_batches(resolved, ranks, corpus, start.progress)) as batches,
        living_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, start, interruptions, echo) as trainer,
    ):
        trainer.run(batches)
        batches.close()
        memory = max_over_ranks(peak_memory_gib(), trainer.engine.device)
        names = splits_to_test(corpus)
        echo(f"scoring the best model (step {start.progress.best_step}) on {', '.join(names)}")
        results = score_best(
            trainer.engine, resolved.run_dir / BEST, trainer.processor, corpus, names, resolved.recipe.evaluation, ranks
        )
        summary = write_scores(resolved, start.progress, results, memory) if ranks.is_main else {}
    if ranks.is_main:
        run_directory.write_status(resolved.run_dir, "finished", step=start.progress.step)
        echo(draw_report(resolved.run_dir))
    return summary


def learn_by_heart(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, echo: Say) -> dict[str, Any]:
    """Overfit the few clips of ``corpus`` and say whether that worked; all ranks call this.

    Returns:
        ``run_dir, steps, loss, learned`` (whether all clips are repeated word by word).
    """
    start = Start()
    with (
        closing(all_batches(resolved, ranks, corpus, start.progress)) as batches,
        living_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, start, interruptions, echo, target_loss=TARGET_LOSS) as trainer,
    ):
        trainer.run(batches)
        predictions, _ = trainer.translate(corpus.splits["train"])
        steps, loss = trainer.progress.step, trainer.loss
    learned, text = verdict(predictions, steps, loss)
    echo(f"\n{text}")
    if ranks.is_main:
        run_directory.write_status(resolved.run_dir, "finished", step=steps)
        echo(draw_report(resolved.run_dir))
    return {"run_dir": str(resolved.run_dir), "steps": steps, "loss": loss, "learned": learned}


@contextmanager
def living_run(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus) -> Iterator[Interruptions]:
    """A run directory whose status is right, however what is inside ends, and where it ends well, a group that is left.

    After an error no rank leaves the process group: that would wait for collectives in which nobody else will be.
    """
    run_dir = resolved.run_dir
    join_rendezvous(ranks)
    on_rank_0(lambda: run_directory.start(resolved, corpus.path))
    # The other ranks see the run directory for the first time when it is there: a shared file system that has once
    # answered "not there" says so for half a minute.
    log_to_file(run_dir / ("log.txt" if ranks.is_main else f"log_rank_{ranks.rank:02d}.txt"))
    swap = swap_to_this_node(resolved.deepspeed)

    def fail(rank: int, host: str, reason: str) -> None:
        run_directory.write_status(run_dir, "failed", rank=rank, host=host, reason=reason)

    def tidy_up() -> None:
        if ranks.local_rank == 0:
            remove_swap_folders(swap)
        if ranks.is_main:
            draw_report(run_dir)

    interruptions = Interruptions(resolved.recipe.training.time_limit, lambda: _given_up(run_dir, ranks))
    with failures.recording_failures(fail), failures.at_failure(tidy_up):
        try:
            on_each_node(lambda: claim_swap_folders(swap))
            training = resolved.recipe.training
            join_process_group(ranks, max(training.data_timeout, training.rank_timeout))
            use_threads(ranks)
            yield interruptions
            leave_process_group()
        except Interrupted as error:
            if ranks.is_main:
                run_directory.write_status(run_dir, "interrupted", reason=f"{type(error).__name__}: {error}")
                draw_report(run_dir)
            leave_process_group()
            raise
        except BaseException as error:
            reported = failures.report_failure(error)
            if not isinstance(error, UserError):
                log.error("rank %d ends: %s", ranks.rank, error, exc_info=error)
            if ranks.is_main and not reported:
                fail(ranks.rank, platform.node(), f"{type(error).__name__}: {error}")
                draw_report(run_dir)
            raise
        finally:
            interruptions.close()
            if ranks.local_rank == 0:
                remove_swap_folders(swap)


def _given_up(run_dir: Path, ranks: Ranks) -> None:
    """A second Ctrl-C: say what it means, in the moment that is left."""
    if ranks.is_main:
        run_directory.write_status(run_dir, "failed", reason="stopped at once by a second Ctrl-C, without saving")
    if ranks.is_local_main:
        text = "interrupted: stopped at once by a second Ctrl-C; the same command goes on from the last checkpoint"
        print(text, file=sys.stderr, flush=True)


@contextmanager
def open_trainer(
    resolved: ResolvedRun,
    ranks: Ranks,
    corpus: Corpus,
    start: Start,
    interruptions: Interruptions,
    echo: Say,
    target_loss: float | None = None,
) -> Iterator[Trainer]:
    """A trainer that stands where the run left off."""
    recipe, progress = resolved.recipe, start.progress
    # The same weights on every rank, then a different dropout.
    seed_everything(recipe.training.seed)
    processor = shared_processor(resolved, ranks, corpus)
    if ranks.is_main:
        _warn_of_unknown(processor.tokenizer, corpus, echo)
    on_each_node(lambda: fetch_backbone(recipe.model))  # may take hours, so nobody waits for it in a collective
    model = build_translator(resolved, corpus, processor.tokenizer)
    echo(f"model: {recipe.model.backbone}, {describe(model)}; {resolved.precision}, ZeRO {resolved.zero_stage}")
    seed_everything(recipe.training.seed + 1 + ranks.rank)
    engine, peaks = make_engine(model, resolved)
    layout, config = run_directory.layout_of(resolved), recipe.model_dump(mode="json")
    checkpoints = resolved.run_dir / "checkpoints"
    fingerprint = model.base.fingerprint if model.base else ""
    lost = _restore_kept(resolved.run_dir, progress)
    if start.checkpoint and start.state:
        _check_base(fingerprint, start)
        echo(f"going on from {start.checkpoint}")
        notes = load_checkpoint(engine, start.checkpoint, start.state, layout=layout, seed=recipe.training.seed)
        for path in on_rank_0(lambda: archive_newer(checkpoints, progress.step)):
            notes.append(f"a newer checkpoint is set aside as {path}")
        if lost:
            notes.append(f"the models kept at step {', '.join(map(str, lost))} are not in {resolved.run_dir} any more")
        for note in notes:
            echo(f"note: {note}")
    identity = SavedState(progress, layout, "", config, run_directory.corpus_identity(corpus), fingerprint, {})
    with (
        open_tracker(
            resolved.run_dir, recipe.tracking, config, is_main=ranks.is_main, resume_step=progress.step
        ) as tracker,
        failures.at_failure(lambda: tracker.close(timeout=2.0)),
        closing(CheckpointWriter(checkpoints, identity, keep_last=recipe.training.keep_last, echo=echo)) as writer,
        failures.at_failure(writer.finish_or_discard),
        failures.reporting_failures(),
    ):
        trainer = Trainer(
            engine,
            peaks,
            resolved=resolved,
            ranks=ranks,
            corpus=corpus,
            processor=processor,
            tracker=tracker,
            checkpoints=writer,
            interruptions=interruptions,
            progress=progress,
            target_loss=target_loss,
        )
        echo(f"training: {len(corpus.splits['train'])} clips, {trainer.total_steps} steps of {resolved.batch}")
        if ranks.is_main:
            warn_of_cut_texts(recipe, corpus.splits["train"].texts, processor.tokenizer, tracker, progress.step, echo)
        try:
            yield trainer
        finally:
            if ranks.is_main:
                tell_communication(resolved, echo)


def _restore_kept(run_dir: Path, progress: Progress) -> list[int]:
    """Agree on the kept models that are still there; all ranks call this.

    Returns:
        the steps of those that are not.
    """
    remembered = progress.kept

    def restore() -> Kept:
        newest = [int(path.name[5:]) for path in complete_checkpoints(run_dir / "checkpoints")[-1:]]
        return restore_models(run_dir, remembered, progress.step, max(newest, default=0))

    progress.kept = on_rank_0(restore)
    return [step for step, _ in remembered if step not in dict(progress.kept)]


def _check_base(fingerprint: str, start: Start) -> None:
    """Refuse frozen weights that are not those which the checkpoint was trained on; all ranks call this."""
    # Rank 0 has seen the weights, others may have received them.
    if not on_rank_0(lambda: start.state is None or fingerprint == start.state.base):
        raise UserError(
            f"{start.checkpoint} was trained on other frozen weights than those that are here now: get the backbone "
            "back that it was trained on (for a hub id its revision, for random weights this toolkit's version)"
        )


def _warn_of_unknown(tokenizer: Any, corpus: Corpus, echo: Say) -> None:
    """Say, on the terminal and in the log, what of the texts the model will never be able to write."""
    unknown = find_unknown_characters(tokenizer, [text for split in corpus.splits.values() for text in split.texts])
    if unknown:
        echo(f"warning: {unknown}")
        log.warning(str(unknown))


def draw_report(run_dir: Path) -> str:
    """Write ``report.html``, and say in a line where it is, or why there is none: no run fails for its picture."""
    try:
        return f"report: {write_report(run_dir)}"
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"no report ({reason}): launch/report.py {run_dir} writes it again"


def describe(model: PoseTranslator) -> str:
    """Size of the model in words."""
    total = count_weights(model.parameters())
    trainable = count_weights(parameter for parameter in model.parameters() if parameter.requires_grad)
    pose = count_weights(model.pose_encoder.parameters())
    return f"{total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M of them trained, pose encoder {pose / 1e6:.1f} M"


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())
