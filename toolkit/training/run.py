"""A whole run, from a resolved recipe to its scores: its directory, its processes, its model, its engine."""

from __future__ import annotations

import logging
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.batching.epochs import mixture_of
from toolkit.batching.loader import TrainBatches, train_batches
from toolkit.checkpointing import run_directory
from toolkit.checkpointing.checkpoints import Progress, SavedState, archive_newer, complete_checkpoints
from toolkit.checkpointing.kept_models import Kept, restore_models
from toolkit.checkpointing.random_states import seed_everything
from toolkit.checkpointing.reader import load_checkpoint
from toolkit.checkpointing.writer import CheckpointWriter
from toolkit.cluster import failures
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.ops import needed_ops
from toolkit.cluster.process_group import join_process_group, leave_process_group, use_threads
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import join_rendezvous, on_each_node, on_rank_0
from toolkit.cluster.swap_files import claim_swap_folders, remove_swap_folders, swap_to_this_node
from toolkit.corpus.packed import Corpus
from toolkit.errors import Interrupted, UserError
from toolkit.evaluation.splits import splits_to_test
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.build import build_processor, build_translator, fetch_backbone
from toolkit.models.loading.weights import count_weights
from toolkit.models.tokenizers import find_unknown_characters
from toolkit.recipe.deepspeed.cells import types_in_words
from toolkit.recipe.paths import BEST
from toolkit.recipe.resolve import ResolvedRun
from toolkit.reporting.report import write_report
from toolkit.tracking.tracker import open_tracker
from toolkit.training.engine import make_engine
from toolkit.training.final_scores import score_best
from toolkit.training.memory_report import compare_memory, report_memory
from toolkit.training.monitoring.communication import report_communication
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.monitoring.memory_phases import MemoryPhases
from toolkit.training.out_of_memory import RunFailures, kernels_counts
from toolkit.training.overfit import TARGET_LOSS, overfit_verdict
from toolkit.training.results import write_scores
from toolkit.training.setting_notes import setting_notes
from toolkit.training.start import Start
from toolkit.training.trainer import Trainer
from toolkit.training.truncated_texts import warn_of_truncated_texts
from toolkit.training.warm_start import warm_start

log = logging.getLogger("toolkit")

Echo = Callable[[str], None]


def train(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, start: Start, echo: Echo) -> dict[str, Any]:
    """Train, or resume training, and score the best model on every test split; all ranks call this.

    ``echo`` prints a line on rank 0, and nothing on the others.

    Returns:
        the content of ``scores.json`` on rank 0; an empty dict elsewhere.

    Raises:
        Interrupted: the run was requested to stop; everything is saved.
        UserError: a guard stopped the run.
    """
    with (
        closing(start_loader(resolved, ranks, corpus, start.progress)) as batches,
        open_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, start, interruptions, echo) as trainer,
    ):
        if ranks.is_main:
            lengths = {"steps": trainer.total_steps, "epoch_steps": trainer.epoch_steps}
            for note in setting_notes(resolved.recipe, corpus, trainer.processor.tokenizer, **lengths):
                echo(f"note: {note}")
                log.info("%s", note)
            if batches.ladder:
                log.info("training.padding: %s", batches.ladder.in_words())
        trainer.run(batches)
        batches.close()
        heaviest = compare_memory(trainer)
        names = splits_to_test(corpus)
        echo(f"scoring the best model (step {start.progress.best_step}) on {', '.join(names)}")
        results = score_best(
            trainer.engine,
            resolved.run_dir / BEST,
            trainer.processor,
            corpus,
            names,
            resolved.evaluation,
            trainer.ranks,
        )
        summary: dict[str, Any] = {}
        if ranks.is_main:
            summary = write_scores(resolved, start.progress, results, trainer.memory.largest(), echo)
            report_memory(trainer, heaviest, echo)
    if ranks.is_main:
        run_directory.write_status(resolved.run_dir, "finished", step=start.progress.step)
        echo(draw_report(resolved.run_dir))
    return summary


def train_overfit(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, echo: Echo) -> dict[str, Any]:
    """Overfit the few clips of ``corpus`` and print whether that worked; all ranks call this.

    Returns:
        ``run_dir, steps, loss, learned`` (whether all clips are repeated word by word).
    """
    start = Start()
    with (
        closing(start_loader(resolved, ranks, corpus, start.progress)) as batches,
        open_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, start, interruptions, echo, target_loss=TARGET_LOSS) as trainer,
    ):
        trainer.run(batches)
        predictions = trainer.translate(corpus.splits["train"]).predictions
        steps, loss = trainer.progress.step, trainer.loss
    learned, text = overfit_verdict(predictions, steps, loss)
    echo(f"\n{text}")
    if ranks.is_main:
        run_directory.write_status(resolved.run_dir, "finished", step=steps)
        echo(draw_report(resolved.run_dir))
    return {"run_dir": str(resolved.run_dir), "steps": steps, "loss": loss, "learned": learned}


def start_loader(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, progress: Progress) -> TrainBatches:
    """This rank's batches without end, from the step where the run stands.

    The worker processes are forked here, so a run calls it before it has threads. The run's tokenizer comes later.
    """
    with failures.without_watching():
        return train_batches(
            corpus.splits["train"],
            None,
            resolved,
            landmark_set=corpus.landmark_set,
            epoch=progress.epoch,
            start_step=progress.epoch_step,
            epochs=None,
            rank=ranks.rank // resolved.tensor_parallel_size,
        )


@contextmanager
def open_run(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus) -> Iterator[Interruptions]:
    """Start the run directory and join the process group; record how the run ends; all ranks enter.

    After an error no rank leaves the process group: leaving waits for collectives that the other ranks never enter.
    """
    run_dir = resolved.run_dir
    join_rendezvous(ranks)
    on_rank_0(lambda: run_directory.start(resolved, corpus, **kernels_counts()))
    # The other ranks look at the run directory for the first time when it exists: a shared file system that has once
    # answered "not there" repeats that for half a minute.
    log_to_file(run_dir / ("log.txt" if ranks.is_main else f"log_rank_{ranks.rank:02d}.txt"))
    if ranks.is_main:
        for note in resolved.notes:
            log.info("%s", note)
        if resolved.choice:
            log.info("%s: %s", resolved.chosen_settings, resolved.choice.in_words())
    swap = swap_to_this_node(resolved.deepspeed)

    def fail(rank: int, host: str, reason: str) -> None:
        run_directory.write_status(run_dir, "failed", rank=rank, host=host, reason=reason)

    def clean_up() -> None:
        if ranks.local_rank == 0:
            remove_swap_folders(swap)
        if ranks.is_main:
            draw_report(run_dir)

    interruptions = Interruptions(resolved.recipe.training.time_limit, lambda: _stop_at_once(run_dir, ranks))
    with failures.recording_failures(fail), failures.at_failure(clean_up):
        try:
            on_each_node(lambda: claim_swap_folders(swap))
            training = resolved.recipe.training
            longest_wait = max(training.data_timeout, training.rank_timeout)
            join_process_group(ranks, longest_wait, needed_ops(resolved.deepspeed))
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
            is_reported = failures.report_failure(error)
            if not isinstance(error, UserError):
                log.error("rank %d ends: %s", ranks.rank, error, exc_info=error)
            if ranks.is_main and not is_reported:
                fail(ranks.rank, platform.node(), f"{type(error).__name__}: {error}")
                draw_report(run_dir)
            raise
        finally:
            interruptions.close()
            if ranks.local_rank == 0:
                remove_swap_folders(swap)


def _stop_at_once(run_dir: Path, ranks: Ranks) -> None:
    """After a second Ctrl-C: record and print what it does, before the process ends."""
    if ranks.is_main:
        run_directory.write_status(run_dir, "failed", reason="stopped at once by a second Ctrl-C, without saving")
    if ranks.is_local_main:
        text = "interrupted: stopped at once by a second Ctrl-C, without saving"
        print(f"{text}\nhint: the same command resumes from the last checkpoint", file=sys.stderr, flush=True)


def open_trainer(
    resolved: ResolvedRun,
    ranks: Ranks,
    corpus: Corpus,
    start: Start,
    interruptions: Interruptions,
    echo: Echo,
    target_loss: float | None = None,
) -> Trainer:
    """Build processor, model and engine, restore the checkpoint, and open trackers and checkpoint writer.

    All ranks call this. The trainer is a context manager that closes what was opened. It alone holds the engine, and
    the engine the model: both can be freed as soon as the caller drops the trainer.
    """
    ranks = replace(ranks, tensor_parallel_size=resolved.tensor_parallel_size)
    recipe, progress, config = resolved.recipe, start.progress, resolved.recipe.model_dump(mode="json")
    memory = MemoryPhases()
    failures.explain_by(RunFailures(resolved, ranks, corpus, memory, progress))
    # The same weights on every rank, then a different dropout.
    seed_everything(recipe.training.seed)
    processor = make_processor(resolved, ranks, corpus)
    if ranks.is_main:
        _warn_of_unknown(processor.tokenizer, corpus, echo)
    on_each_node(lambda: fetch_backbone(recipe.model))  # may take hours, so no rank waits for it in a collective
    origin = warm_start(resolved, ranks, corpus, processor.tokenizer, resumes=start.checkpoint is not None, echo=echo)
    model = build_translator(resolved, corpus, processor.tokenizer, origin)
    fingerprint = model.base.fingerprint if model.base else ""
    types = types_in_words(resolved.deepspeed)
    echo(f"model: {recipe.model.backbone}, {describe(model)}; {types}, ZeRO {resolved.zero_stage}")
    seed_everything(recipe.training.seed + 1 + ranks.data_parallel_rank)
    engine, peaks = make_engine(model, resolved)
    _resume(engine, resolved, start, fingerprint, echo)
    identity = SavedState(
        progress,
        run_directory.layout_of(resolved),
        optimizer="",
        recipe=config,
        corpus=run_directory.corpus_identity(corpus),
        base=fingerprint,
        counters={},
    )
    with ExitStack() as opened:
        tracker = opened.enter_context(
            open_tracker(resolved.run_dir, recipe.tracking, config, is_main=ranks.is_main, resume_step=progress.step)
        )
        opened.enter_context(failures.at_failure(lambda: tracker.close(timeout=2.0)))
        checkpoints = CheckpointWriter(
            resolved.run_dir / "checkpoints", identity, keep_last=recipe.training.keep_last, echo=echo
        )
        opened.enter_context(closing(checkpoints))
        opened.enter_context(failures.at_failure(checkpoints.finish_or_discard))
        opened.enter_context(failures.reporting_failures())
        if ranks.is_main:
            opened.callback(report_communication, resolved, echo)
        trainer = Trainer(
            engine,
            peaks,
            resolved=resolved,
            ranks=ranks,
            corpus=corpus,
            processor=processor,
            tracker=tracker,
            checkpoints=checkpoints,
            interruptions=interruptions,
            progress=progress,
            target_loss=target_loss,
            memory=memory,
        )
        texts = corpus.splits["train"].texts
        echo(f"training: {len(texts)} clips, {trainer.total_steps} steps of {resolved.batch}")
        for line in mixture_of(corpus.splits["train"], recipe).lines():
            echo(f"  {line}")
        if ranks.is_main:
            warn_of_truncated_texts(recipe, texts, processor.tokenizer, tracker, progress.step, echo)
        trainer.on_exit = opened.pop_all()
    return trainer


def make_processor(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus) -> PoseProcessor:
    """The run's processor, made by rank 0: training a tokenizer twice may give two. All ranks call this.

    Rank 0 sends its files to the others, because a shared file system may show them late. Each rank reads its own copy
    from the run directory, so that what a killed rank leaves there is removed when the run resumes.
    """
    folder = resolved.run_dir / run_directory.PROCESSOR

    def make() -> dict[str, bytes]:
        for left in folder.parent.glob(".processor.rank*.partial"):
            shutil.rmtree(left)
        if not folder.exists():
            partial = folder.with_name(".processor.partial")
            build_processor(resolved.recipe, corpus).save_pretrained(partial)
            partial.rename(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    files = on_rank_0(make)
    if ranks.is_main:
        return PoseProcessor.from_pretrained(folder)
    own = folder.with_name(f".processor.rank{ranks.rank}.partial")
    try:
        for name, content in files.items():
            copy = own / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        return PoseProcessor.from_pretrained(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _resume(engine: Any, resolved: ResolvedRun, start: Start, fingerprint: str, echo: Echo) -> None:
    """Restore the kept models and the checkpoint that the run resumes from; all ranks call this."""
    missing = _restore_kept(resolved.run_dir, start.progress)
    if start.checkpoint is None or start.state is None:
        return
    _check_base(fingerprint, start)
    echo(f"resuming from {start.checkpoint}")
    layout, seed = run_directory.layout_of(resolved), resolved.recipe.training.seed
    notes = load_checkpoint(engine, start.checkpoint, start.state, layout=layout, seed=seed)
    for path in on_rank_0(lambda: archive_newer(resolved.run_dir / "checkpoints", start.progress.step)):
        notes.append(f"a newer checkpoint was moved to {path}")
    if missing:
        steps = ", ".join(map(str, missing))
        notes.append(f"the models that were kept at step {steps} are missing in {resolved.run_dir}")
    for note in notes:
        echo(f"note: {note}")
        log.info("%s", note)


def _restore_kept(run_dir: Path, progress: Progress) -> list[int]:
    """Make the folders of the kept models agree with the progress; returns the steps of those that are missing.

    All ranks call this.
    """
    remembered = progress.kept

    def restore() -> Kept:
        newest = [int(path.name[5:]) for path in complete_checkpoints(run_dir / "checkpoints")[-1:]]
        return restore_models(run_dir, remembered, progress.step, max(newest, default=0))

    progress.kept = on_rank_0(restore)
    return [step for step, _ in remembered if step not in dict(progress.kept)]


def _check_base(fingerprint: str, start: Start) -> None:
    """Refuse frozen weights other than those that the checkpoint was trained on; all ranks call this."""
    # Rank 0 has read the weights, the others may have received them.
    if not on_rank_0(lambda: start.state is None or fingerprint == start.state.base):
        raise UserError(
            f"{start.checkpoint} was trained on other frozen weights than those of the backbone now",
            "use the backbone that it was trained on: of a hub id the same revision, of random weights the same "
            "version of this toolkit",
        )


def _warn_of_unknown(tokenizer: Any, corpus: Corpus, echo: Echo) -> None:
    """Warn, on the terminal and in the log, of characters of the texts that the model can never write."""
    unknown = find_unknown_characters(tokenizer, [text for split in corpus.splits.values() for text in split.texts])
    if unknown:
        echo(f"warning: {unknown}")
        log.warning(str(unknown))


def draw_report(run_dir: Path) -> str:
    """Write ``report.html``; returns a line with its path, or with the reason where it fails: no run fails for it."""
    try:
        return f"report: {write_report(run_dir)}"
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"no report ({reason}): launch/report.py {run_dir} writes it again"


def describe(model: PoseTranslator) -> str:
    """The model's numbers of parameters, as a phrase."""
    total = count_weights(model.parameters())
    trainable = count_weights(parameter for parameter in model.parameters() if parameter.requires_grad)
    pose = count_weights(model.pose_encoder.parameters())
    return f"{total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M of them trained, pose encoder {pose / 1e6:.1f} M"
