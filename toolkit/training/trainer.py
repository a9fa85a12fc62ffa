"""The training loop: optimizer steps, epochs, evaluations and checkpoints, on one rank of many."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from toolkit.batching.collate import Batch
from toolkit.batching.copies import copied_ahead, on_device
from toolkit.batching.epochs import epoch_steps
from toolkit.batching.loader import TrainBatches
from toolkit.checkpointing.checkpoints import Progress
from toolkit.checkpointing.kept_models import Kept, admit, keep_only, place_model
from toolkit.checkpointing.run_directory import write_status
from toolkit.checkpointing.writer import CheckpointWriter
from toolkit.cluster import failures
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import on_rank_0
from toolkit.corpus.packed import Corpus, Split
from toolkit.models.compiled import before_compilations, row_functions
from toolkit.models.loading.weights import save_model, saved_state_dict
from toolkit.models.loss import batch_losses
from toolkit.models.processor import PoseProcessor
from toolkit.models.tokenizers import special_ids
from toolkit.recipe.batches import total_steps
from toolkit.recipe.resolve import ResolvedRun
from toolkit.scoring.metrics import Scores
from toolkit.scoring.predictions import write_predictions
from toolkit.scoring.table import choose_samples
from toolkit.tracking.progress import ProgressLine, StepFigures
from toolkit.tracking.tracker import Tracker
from toolkit.training.engine import gradient_norm, set_learning_rate, take_step
from toolkit.training.evaluating import Evaluated, collapse_warning, evaluate_split
from toolkit.training.halving import Halving
from toolkit.training.monitoring.gradient_guard import GradientGuard
from toolkit.training.monitoring.interruptions import Interruptions, interrupted_by
from toolkit.training.monitoring.loss_spikes import LossSpikes
from toolkit.training.monitoring.memory_phases import MemoryPhases, Phase, memory_figures
from toolkit.training.monitoring.metering import StepCounts, StepMeter
from toolkit.training.monitoring.rank_watch import Limits, RankWatch
from toolkit.training.monitoring.skipped_steps import SkippedSteps
from toolkit.training.monitoring.step_figures import LateNorm, check_losses, read_together
from toolkit.training.optimization.averaging import averaged_weights, update_average
from toolkit.training.optimization.freezing import BackboneFreeze
from toolkit.training.optimization.gradient_reduction import backward, reduced_once, when_reduced
from toolkit.training.optimization.schedules import backbone_factor, scheduled_factor, warmup_steps
from toolkit.training.pass_graphs import pass_graphs

log = logging.getLogger("toolkit")


@dataclass(eq=False, repr=False)
class Trainer:
    """Trains one translator on one corpus. A context manager; leaving it runs ``on_exit``.

    All ranks build one and call its methods in the same order.
    """

    engine: Any  # DeepSpeed's
    peaks: list[tuple[str, float]]  # name and peak learning rate of each of its parameter groups
    _: KW_ONLY
    resolved: ResolvedRun
    ranks: Ranks
    corpus: Corpus  # the model trains on its ``train`` split; its ``dev`` split selects the best model
    processor: PoseProcessor
    tracker: Tracker
    checkpoints: CheckpointWriter
    interruptions: Interruptions
    progress: Progress
    target_loss: float | None = None  # nats per token below which to stop early; None to train to the end
    memory: MemoryPhases = field(default_factory=MemoryPhases)

    def __post_init__(self) -> None:
        self.recipe, resolved, progress = self.resolved.recipe, self.resolved, self.progress
        self.on_exit, self.rows = ExitStack(), row_functions(self.engine.module)
        training = self.recipe.training
        may_overflow = resolved.precision == "fp16"
        self.gradient_guard: GradientGuard | None = GradientGuard(self.engine.module, may_overflow=may_overflow)
        frozen_steps = training.freeze_backbone_steps
        self.freeze = BackboneFreeze(self.engine.module) if 0 < frozen_steps >= progress.step else None
        self.weights = list(self.engine.module.parameters())  # to look them up takes milliseconds of each step
        self.when_reduced = when_reduced(self.engine)
        self.graphs = pass_graphs(self.engine, resolved, self._losses)
        self.halving = Halving(resolved, self.ranks.rank, self.warn)
        self.loss_spikes, self.skipped_steps = LossSpikes(), SkippedSteps(may_overflow=may_overflow)
        self.rank_watch = RankWatch(
            self.ranks,
            lambda reason: write_status(resolved.run_dir, "failed", reason=reason),
            Limits(shortest=training.rank_timeout, data=training.data_timeout),
        )
        self.meter = StepMeter(resolved, self.engine.device, self.ranks, self.memory)
        self.late_norm = LateNorm()
        self.loss = math.inf  # of the last step, nats per token
        self.train_split = self.corpus.splits["train"]
        self.epoch_steps = epoch_steps(self.train_split, self.recipe)
        self.total_steps = total_steps(training, self.epoch_steps)
        if self._is_patience_over():
            self.total_steps = progress.step
        self.line = ProgressLine(
            total_steps=self.total_steps,
            total_epochs=self.total_steps / self.epoch_steps,
            start_step=progress.step,
            log_every=training.log_every,
            enabled=self.ranks.is_main,
        )
        self.special_ids = torch.tensor(special_ids(self.processor.tokenizer), device=self.engine.device)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.on_exit.__exit__(*error)

    def run(self, batches: TrainBatches) -> None:
        """Train to the end on this rank's batches, which come without end from where the progress stands.

        Raises:
            Interrupted: the run was requested to stop; everything is saved.
            TrainingStopped: a guard found the run broken.
        """
        batches.set_tokenizer(self.processor.tokenizer)
        self.engine.train()
        self.rank_watch.start()
        try:
            with self.line, failures.reporting_failures(), before_compilations(self.rank_watch.exempt):
                self._run(batches)
                self._keep_last()
                on_rank_0(lambda: keep_only(self.resolved.run_dir, [step for step, _ in self.progress.kept]))
        finally:
            self.rank_watch.close()
            self.graphs = None  # the final scores need the memory

    def _run(self, stream: TrainBatches) -> None:
        self.memory.enter("step")
        self.meter.restart()
        while self.progress.step < self.total_steps:
            with self.rank_watch.waiting_for_data():
                batches = next(stream)
            if self.progress.epoch_step == self.epoch_steps:  # an epoch ends where the next one begins
                self.progress.epoch += 1
                self.progress.epoch_step = 0
            stop = self.step(batches)
            if self.target_loss is not None and self.loss < self.target_loss:
                self.total_steps = self.progress.step
            if self._evaluation_is_due():
                self.evaluate()
                self._stop_early()
            is_last = self.progress.step == self.total_steps
            if is_last:
                self._keep_last()
            if stop or is_last or self.progress.step % self.recipe.training.save_every == 0:
                self.save()
            if stop and not is_last:
                self.checkpoints.wait()
                raise interrupted_by(self.interruptions.reason, self.progress.step, self.total_steps)
        self.checkpoints.wait()

    def step(self, batches: Sequence[Batch]) -> bool:
        """One optimizer step over this rank's micro-batches.

        Returns:
            whether any rank was requested to stop; all ranks get the same answer.
        """
        training, progress = self.recipe.training, self.progress
        self.rank_watch.begin(progress.step + 1)
        sums = self.meter.begin(batches)
        factor = scheduled_factor(training, progress.step, self.total_steps, progress.extension)
        self._set_learning_rates(factor)
        own = self._backward(batches, sums[0])
        counts, (nll, ctc, stops), norm = self._look_at_device(sums, own, batches)
        is_taken = take_step(self.engine, self.resolved, self.weights, norm)
        if self.resolved.zero_stage:
            norm = self.engine.get_global_grad_norm()
        if training.ema and is_taken:
            update_average(self.engine, training.ema, progress.step + 1)
        self.rank_watch.end()
        self.memory.unused.after_step()
        seconds, speed = self.meter.end(counts)
        progress.step += 1
        progress.epoch_step += 1
        progress.seconds += seconds
        progress.clips += int(counts.clips)
        self.loss = nll / max(counts.tokens, 1)
        self._log_step(speed, training.learning_rate * factor, norm, ctc / max(counts.tokens, 1))
        return stops > 0

    def _set_learning_rates(self, factor: float) -> None:
        """Set them to their peaks times ``factor``; the backbone's is 0 until it is thawed, and then warms up."""
        training, step = self.recipe.training, self.progress.step
        if self.freeze and step == training.freeze_backbone_steps:
            self.freeze.thaw(self.engine)
            self.freeze = None
        warmup = warmup_steps(training, self.total_steps, self.progress.extension)
        of_backbone = backbone_factor(factor, step, training.freeze_backbone_steps, warmup)
        set_learning_rate(self.engine, self.peaks, factor, of_backbone)

    def _backward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Forward and backward passes of a step, which has ``tokens`` target tokens over all ranks.

        Returns:
            token loss and CTC loss of this rank, or its share of its group's, in nats: float64 [2] on the device.
        """
        # DeepSpeed averages over data-parallel ranks; this undoes it and divides by the global token count. It would
        # average over a fixed number of accumulation steps, too: that is turned off, because their number varies.
        scale = (self.ranks.data_parallel_size / tokens.clamp(min=1)).float()
        weight, losses, step = self.recipe.training.ctc_weight, [], self.progress.step + 1
        ahead = self.memory.seen(copied_ahead(batches, self.engine.device))
        if self.graphs:
            halved, around = partial(self.halving.both, step), partial(self.meter.forward, self.engine.module)
            return self.graphs.backward(ahead, scale, halved, around)

        def forward(batch: Batch) -> tuple[Tensor, Tensor]:
            with self.meter.forward(self.engine.module, batch):
                return self._losses(batch)

        def backwards(nll: Tensor, ctc: Tensor, is_last: bool) -> list[Tensor]:
            self.engine.set_gradient_accumulation_boundary(is_last)
            backward(self.engine, (nll + weight * ctc if weight else nll) * scale, self.when_reduced)
            return [nll.detach(), ctc.detach()]

        with reduced_once(self.engine, self.when_reduced, len(batches)):
            for number, batch in enumerate(ahead, start=1):
                losses += self.halving.compute(batch, step, forward, backwards, is_last=number == len(batches))
        return torch.stack(losses).double().view(-1, 2).sum(0) / self.ranks.tensor_parallel_size

    def _losses(self, batch: Batch, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed token loss and CTC loss of a micro-batch, in nats, by the engine or another ``model``."""
        smoothing = self.recipe.training.label_smoothing if self.engine.training else 0.0
        return batch_losses(model or self.engine, batch, self.special_ids, label_smoothing=smoothing, rows=self.rows)

    def _look_at_device(
        self, counts: Tensor, own: Tensor, batches: Sequence[Batch]
    ) -> tuple[StepCounts, list[float], float | None]:
        """Read the step's figures, before its weights change: the one time in a step that the host waits for a GPU.

        Args:
            counts: from the meter.
            own: this rank's losses, from the backward passes.
            batches: of this rank.

        Returns:
            counts; token loss, CTC loss and number of ranks that were requested to stop; at ZeRO stage 0 the gradient
            norm.

        Raises:
            TrainingStopped: the loss of any rank is not finite; every such rank has written its clips to a file. Or a
                tensor has no gradient after the first backward passes.
        """
        device, guard, self.gradient_guard = self.engine.device, self.gradient_guard, None
        problems = guard.count(device) if guard else torch.zeros((), device=device)
        sums = torch.cat([own, on_device([self.interruptions.wanted()], device), problems.double().view(1)])
        dist.all_reduce(sums)
        norm = torch.zeros(0, device=device) if self.resolved.zero_stage else gradient_norm(self.weights)
        read = read_together(counts, sums, own, norm, self.late_norm.unread(device))
        self.late_norm.arrived(read[4])
        check_losses(read[1][:2], read[2], batches, self.progress.step + 1, self.resolved.run_dir, self.ranks.rank)
        if guard:
            guard.check(read[1][3])
        return StepCounts(*read[0]), read[1][:3], next(iter(read[3]), None)

    def _log_step(self, speed: dict[str, float], learning_rate: float, norm: Any, ctc_loss: float) -> None:
        """Report the step that was taken to the progress line and the trackers, when its gradient norm is read."""
        progress = self.progress
        figures = StepFigures(
            step=progress.step,
            epoch=progress.epoch + progress.epoch_step / self.epoch_steps,
            loss=self.loss,
            learning_rate=learning_rate,
            grad_norm=None,
            **speed,
        )
        self.late_norm.hold(norm, lambda norm: self._log_figures(replace(figures, grad_norm=norm), ctc_loss))

    def _log_figures(self, figures: StepFigures, ctc_loss: float) -> None:
        """Report a step; warn where the loss jumped, or no weight changed."""
        self.line.update(figures)
        values = {key: value for key, value in asdict(figures).items() if key != "step" and value is not None}
        if self.recipe.training.ctc_weight:
            values["ctc_loss"] = ctc_loss
        self.tracker.log(figures.step, values)
        self.warn(self.loss_spikes.see(figures.step, figures.loss, figures.grad_norm), figures.step)
        self.warn(self.skipped_steps.see(figures.step, figures.grad_norm), figures.step)

    def _evaluation_is_due(self) -> bool:
        """Whether the dev split is to be evaluated after this step: at the run's end and at every few epochs' end."""
        if not self.corpus.splits.get("dev"):
            return False
        epoch_ends = self.progress.epoch_step == self.epoch_steps
        of_this_epoch = (self.progress.epoch + 1) % self.recipe.training.eval_every == 0
        return self.progress.step == self.total_steps or (epoch_ends and of_this_epoch)

    def evaluate(self) -> None:
        """Translate and score the dev split; keep the model where it is among the best."""
        progress, training = self.progress, self.recipe.training
        with self._paused("evaluation"):
            evaluated = self.translate(self.corpus.splits["dev"])
            step, select_by = progress.step, self.recipe.evaluation.select_by
            scores = evaluated.selected(self.recipe.evaluation.select_corpus)
            kept = admit(progress.kept, step, scores, select_by=select_by, keep=training.keep_best)
            is_best = kept[0][0] == step
            self._log_evaluation(evaluated, is_best)
            progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
            if any(kept_step == step for kept_step, _ in kept):
                self.save_model(kept, scores)
            progress.kept = kept

    def _stop_early(self) -> None:
        """Let the run end here after ``training.early_stopping`` evaluations without a better one."""
        progress, select_by = self.progress, self.recipe.evaluation.select_by
        if self._is_patience_over() and progress.step < self.total_steps:
            self.line.echo(
                f"stopping early: no better {select_by} in {progress.evaluations_since_best} evaluations; "
                f"the best model is that of step {progress.best_step}"
            )
            self.total_steps = progress.step

    def _keep_last(self) -> None:
        """Keep the last model as the best one where there is no dev split to compare models by."""
        progress = self.progress
        if progress.kept and (self.corpus.splits.get("dev") or progress.best_step == progress.step):
            return
        kept: Kept = [(progress.step, None)]
        with self._paused("save"):
            self.save_model(kept, None)
        progress.kept = kept

    def _is_patience_over(self) -> bool:
        patience = self.recipe.training.early_stopping
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _log_evaluation(self, evaluated: Evaluated, is_best: bool) -> None:
        """Report an evaluation: scores, predictions, samples and warnings."""
        progress, settings = self.progress, self.recipe.evaluation
        epoch = progress.epoch + 1
        self.tracker.log(progress.step, evaluated.figures("dev"), kind="eval")
        if self.ranks.is_main:
            path = self.resolved.run_dir / "predictions" / f"predictions_epoch_{epoch:03d}.csv"
            write_predictions(path, evaluated.predictions)
            shown = choose_samples(evaluated.predictions, settings.samples, self.recipe.training.seed)
            rows = [{"uid": row.uid, "reference": row.reference, "hypothesis": row.hypothesis} for row in shown]
            self.tracker.table(progress.step, "dev_samples", rows)
        best = f"  (best {settings.select_by} so far)" if is_best else ""
        self.line.echo(f"dev after epoch {epoch}: {evaluated.line(settings.select_by)}{best}")
        self.warn(collapse_warning(evaluated, self.train_split.texts, epoch, settings))

    def translate(self, split: Split) -> Evaluated:
        """Translate and score a split with the weights that would be kept."""
        with self._kept_weights():
            return evaluate_split(self.engine, split, self.processor, self.resolved.evaluation, self.ranks)

    def save(self) -> None:
        """Begin to write a checkpoint; ``self.checkpoints.wait()`` returns when it is complete."""
        with self._paused("save"):
            self.checkpoints.save(self.engine, self.progress)

    def save_model(self, kept: Kept, scores: Scores | None) -> None:
        """Write the model, or its average, to the folder that ``kept`` gives it: ``best/`` or one beside it."""
        with self.memory.during("save"), self._kept_weights():
            weights = saved_state_dict(self.engine.module, keep=self.ranks.is_main)
        on_rank_0(
            lambda: place_model(
                self.resolved.run_dir,
                kept,
                self.progress.step,
                scores,
                lambda folder: save_model(folder, self.engine.module, self.processor, weights),
                in_checkpoints=self.checkpoints.models,
            )
        )

    def _kept_weights(self) -> AbstractContextManager[None]:
        """The averaged weights with ``training.ema``, else the trained ones."""
        return averaged_weights(self.engine) if self.recipe.training.ema else nullcontext()

    @contextmanager
    def _paused(self, phase: Phase) -> Iterator[None]:
        """Between steps: no limit on its time, and it counts in no step's figures."""
        self.late_norm.flush()
        with self.rank_watch.paused():
            with self.memory.during(phase):
                yield
            if self.memory.compare(self.engine.device):
                self.tracker.log(self.progress.step, memory_figures(self.memory.of_ranks, {}), kind="memory")
        self.meter.restart()

    def warn(self, text: str | None, step: int | None = None) -> None:
        """Warn on the terminal, in the log (and so in the report) and in the trackers."""
        if text and self.ranks.is_main:
            self.line.echo(f"warning: {text}")
            log.warning(text)
            self.tracker.log(step or self.progress.step, {"warning": text}, kind="event")
