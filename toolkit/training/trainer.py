"""The training loop: optimizer steps, epochs, evaluations and checkpoints, on one rank of many."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import distributed as dist

from toolkit.batching.collate import IGNORED_LABEL, Batch
from toolkit.batching.loader import TrainBatches
from toolkit.batching.order import steps_per_epoch
from toolkit.checkpointing.checkpoints import Progress
from toolkit.checkpointing.kept_models import Kept, admit, keep_only, place_model
from toolkit.checkpointing.run_directory import write_status
from toolkit.checkpointing.writer import CheckpointWriter
from toolkit.cluster import failures
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import on_rank_0
from toolkit.corpus.packed import Corpus, Split
from toolkit.errors import Interrupted
from toolkit.models.loading.weights import save_model, saved_state_dict
from toolkit.models.processor import PoseProcessor
from toolkit.models.tokenizers import special_ids
from toolkit.recipe.resolve import ResolvedRun
from toolkit.scoring.metrics import Scores
from toolkit.scoring.predictions import Prediction, write_predictions
from toolkit.scoring.table import choose_samples
from toolkit.tracking.progress import ProgressLine, StepFigures
from toolkit.tracking.tracker import Tracker
from toolkit.training.engine import set_learning_rate
from toolkit.training.evaluating import Evaluated, evaluate_split, warn_of_collapse
from toolkit.training.loss import ctc_loss, token_loss
from toolkit.training.monitoring.alarms import SpikeWatch
from toolkit.training.monitoring.guards import GradientWatch, TrainingStopped
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.monitoring.metering import StepMeter, Window
from toolkit.training.monitoring.watch import Limits, RankWatch
from toolkit.training.optimization.averaging import averaged_weights, update_average
from toolkit.training.optimization.freezing import BackboneFreeze
from toolkit.training.optimization.gradient_reduction import sent_once
from toolkit.training.optimization.schedules import backbone_factor, scheduled_factor, total_steps, warmup_steps

log = logging.getLogger("toolkit")


class Trainer:
    """Trains one translator on one corpus.

    All ranks build one and call its methods in step.

    Args:
        engine: the DeepSpeed engine.
        peaks: name and peak learning rate of each of its parameter groups.
        resolved: the run.
        ranks: which rank this is.
        corpus: its ``train`` split is learnt, its ``dev`` split picks the best model.
        processor: goes with the model.
        tracker: where figures go.
        checkpoints: where the run's state goes.
        interruptions: reasons to stop early.
        progress: where an earlier start of the run left off.
        target_loss: nats per token at which to stop early; None to go on to the end.
    """

    def __init__(
        self,
        engine: Any,
        peaks: list[tuple[str, float]],
        *,
        resolved: ResolvedRun,
        ranks: Ranks,
        corpus: Corpus,
        processor: PoseProcessor,
        tracker: Tracker,
        checkpoints: CheckpointWriter,
        interruptions: Interruptions,
        progress: Progress,
        target_loss: float | None = None,
    ) -> None:
        self.engine = engine
        self.peaks = peaks
        self.resolved = resolved
        self.recipe = resolved.recipe
        self.ranks = ranks
        self.corpus = corpus
        self.processor = processor
        self.tracker = tracker
        self.checkpoints = checkpoints
        self.interruptions = interruptions
        self.progress = progress
        self.target_loss = target_loss
        training = self.recipe.training
        self.gradient_watch: GradientWatch | None = GradientWatch(
            engine.module, may_overflow=resolved.precision == "fp16"
        )
        self.freeze = BackboneFreeze(engine.module) if 0 < training.freeze_backbone_steps >= progress.step else None
        self.spikes = SpikeWatch()
        self.watch = RankWatch(
            ranks,
            lambda reason: write_status(resolved.run_dir, "failed", reason=reason),
            Limits(shortest=training.rank_timeout, data=training.data_timeout),
        )
        self.meter = StepMeter(resolved, engine.device, ranks.world_size)
        self.loss = math.inf  # of the last step, nats per token
        self.train_split = corpus.splits["train"]
        self.epoch_steps = steps_per_epoch(len(self.train_split), training.global_batch_size)
        self.total_steps = total_steps(training, self.epoch_steps)
        if self._is_patience_over():
            self.total_steps = progress.step
        self.line = ProgressLine(
            total_steps=self.total_steps,
            total_epochs=self.total_steps / self.epoch_steps,
            start_step=progress.step,
            log_every=training.log_every,
            enabled=ranks.is_main,
        )
        self.special_ids = torch.tensor(special_ids(processor.tokenizer), device=engine.device)

    def run(self, batches: TrainBatches) -> None:
        """Train to the end.

        Args:
            batches: this rank's, without end, from where the progress stands; the run's tokenizer makes their labels.

        Raises:
            Interrupted: asked to stop; everything is saved.
            TrainingStopped: a guard found the run broken.
        """
        batches.tokenise_by(self.processor.tokenizer)
        self.engine.train()
        self.watch.start()
        try:
            with self.line, failures.reporting_failures():
                self._run(batches)
                self._keep_the_last()
                on_rank_0(lambda: keep_only(self.resolved.run_dir, [step for step, _ in self.progress.kept]))
        finally:
            self.watch.close()

    def _run(self, stream: TrainBatches) -> None:
        training = self.recipe.training
        self.meter.restart()
        while self.progress.step < self.total_steps:
            with self.watch.waiting_for_data():
                batches = next(stream)
            if self.progress.epoch_step == self.epoch_steps:  # an epoch ends where the next one begins
                self.progress.epoch += 1
                self.progress.epoch_step = 0
            stop = self.step(batches)
            ends = self.progress.epoch_step == self.epoch_steps or self.progress.step == self.total_steps
            if ends and self._evaluation_is_due():
                self.evaluate()
            if self.progress.step == self.total_steps:
                self._keep_the_last()
            if stop or self.progress.step % training.save_every == 0 or self.progress.step == self.total_steps:
                self.save()
            if stop and self.progress.step < self.total_steps:
                self.checkpoints.wait()
                reason = self.interruptions.reason or "another rank's signal"
                raise Interrupted(
                    f"stopped by {reason} after step {self.progress.step} of {self.total_steps}; "
                    "everything is saved, the same command goes on"
                )
        self.checkpoints.wait()

    def step(self, batches: Sequence[Batch]) -> bool:
        """One optimizer step over this rank's micro-batches.

        Returns:
            whether the ranks agreed to stop after it.
        """
        training = self.recipe.training
        self.watch.begin(self.progress.step + 1)
        window = self.meter.window(batches, self.interruptions.wanted())
        factor = self._set_learning_rate()
        # DeepSpeed averages over ranks; this undoes it and divides by the global token count. It would average over a
        # fixed number of accumulation steps, too: that is turned off, because their number and sizes vary.
        scale = self.ranks.world_size / max(window.tokens, 1)
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        with sent_once(self.engine, len(batches)):
            for number, batch in enumerate(batches, start=1):
                self.engine.set_gradient_accumulation_boundary(number == len(batches))
                with self.meter.forward(self.engine.module, batch):
                    nll, ctc = self._losses(batch.to(self.engine.device))
                sums += torch.stack([nll.detach(), ctc.detach()]).double()
                self.engine.backward((nll + training.ctc_weight * ctc) * scale, scale_wrt_gas=False)
        self._check(sums, batches)
        self.engine.step()
        if training.ema:
            update_average(self.engine, training.ema, self.progress.step + 1)
        self.watch.end()
        self._advance(window, sums, factor)
        return window.stop

    def _set_learning_rate(self) -> float:
        """Set the rates of the step that begins, and let the backbone learn when its time has come."""
        training, step = self.recipe.training, self.progress.step
        extension = self.progress.extension
        warmup = warmup_steps(training, self.total_steps, extension)
        factor = scheduled_factor(training, step, self.total_steps, extension)
        if self.freeze and step == training.freeze_backbone_steps:
            self.freeze.thaw(self.engine)
            self.freeze = None
        waiting = backbone_factor(factor, step, training.freeze_backbone_steps, warmup)
        set_learning_rate(self.engine, self.peaks, factor, waiting)
        return factor

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed token loss and CTC loss of a micro-batch, in nats."""
        training = self.recipe.training
        output = self.engine(
            poses=batch.poses,
            visible=batch.visible,
            frame_mask=batch.frame_mask,
            labels=batch.labels,
            labelled_only=True,
        )
        counted = batch.labels[batch.labels != IGNORED_LABEL]
        nll = token_loss(output.logits, counted, training.label_smoothing if self.engine.training else 0.0)
        if output.ctc_logits is None:
            return nll, torch.zeros_like(nll)
        return nll, ctc_loss(output.ctc_logits, output.encoder_mask, batch.labels, self.special_ids)

    def _check(self, sums: torch.Tensor, batches: Sequence[Batch]) -> None:
        """Stop before the optimizer step when the loss of any rank is not finite; check gradients once."""
        finite = bool(sums.isfinite().all())
        dist.all_reduce(sums)
        if not bool(sums.isfinite().all()):
            if not finite:
                uids = [uid for batch in batches for uid in batch.uids]
                path = self.resolved.run_dir / f"not_finite_rank_{self.ranks.rank:02d}.txt"
                path.write_text("\n".join(uids) + "\n", encoding="utf-8")
            raise TrainingStopped(
                f"the loss is not finite at step {self.progress.step + 1}; the clips of that step are listed in "
                f"{self.resolved.run_dir}/not_finite_rank_*.txt: look at them, or lower training.learning_rate"
            )
        if self.gradient_watch:
            self.gradient_watch.check(self.engine.device)
            self.gradient_watch = None
        self.grad_norm = None
        if self.resolved.zero_stage == 0:
            # DeepSpeed tells no norm at this stage. Its gradients are whole and summed by now, and not yet clipped.
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))

    def _advance(self, window: Window, sums: torch.Tensor, factor: float) -> None:
        """Count the step and tell about it."""
        progress, training = self.progress, self.recipe.training
        seconds, measured = self.meter.end(window)
        progress.step += 1
        progress.epoch_step += 1
        progress.seconds += seconds
        progress.clips += window.clips
        nll, ctc = sums.tolist()
        self.loss = nll / max(window.tokens, 1)
        if self.target_loss is not None and self.loss < self.target_loss:
            self.total_steps = progress.step
        norm = self.engine.get_global_grad_norm() if self.grad_norm is None else self.grad_norm
        figures = StepFigures(
            step=progress.step,
            epoch=progress.epoch + progress.epoch_step / self.epoch_steps,
            loss=self.loss,
            learning_rate=training.learning_rate * factor,
            grad_norm=float(norm) if norm is not None else None,
            **measured,
        )
        self.line.update(figures)
        values = {key: value for key, value in asdict(figures).items() if key != "step" and value is not None}
        if training.ctc_weight:
            values["ctc_loss"] = ctc / max(window.tokens, 1)
        self.tracker.log(progress.step, values)
        self._warn(self.spikes.see(progress.step, self.loss, figures.grad_norm))

    def _evaluation_is_due(self) -> bool:
        last = self.progress.step == self.total_steps
        return bool(self.corpus.splits.get("dev")) and (
            last or (self.progress.epoch + 1) % self.recipe.training.eval_every == 0
        )

    def evaluate(self) -> Scores:
        """Translate and score the dev split; keep the model when it is the best so far, stop when patience is over."""
        progress, settings = self.progress, self.recipe.evaluation
        with self._aside():
            evaluated = self._evaluated(self.corpus.splits["dev"])
            scores, step = evaluated.scores, progress.step
            kept = admit(progress.kept, step, scores, select_by=settings.select_by, keep=self.recipe.training.keep_best)
            is_better = kept[0][0] == step
            self._tell(evaluated, is_better)
            progress.evaluations_since_best = 0 if is_better else progress.evaluations_since_best + 1
            if any(kept_step == step for kept_step, _ in kept):
                self.save_model(kept, scores)
            progress.kept = kept
        if self._is_patience_over() and progress.step < self.total_steps:
            self.line.echo(
                f"stopping early: no better {settings.select_by} in {progress.evaluations_since_best} evaluations; "
                f"the best model is that of step {progress.best_step}"
            )
            self.total_steps = progress.step
        return scores

    def _keep_the_last(self) -> None:
        """Where nothing is ever compared, for want of a dev split, the last model is the best one known."""
        progress = self.progress
        if progress.kept and (self.corpus.splits.get("dev") or progress.best_step == progress.step):
            return
        kept: Kept = [(progress.step, None)]
        with self._aside():
            self.save_model(kept, None)
        progress.kept = kept

    def _is_patience_over(self) -> bool:
        patience = self.recipe.training.early_stopping
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _tell(self, evaluated: Evaluated, is_better: bool) -> None:
        """Scores, predictions, samples and warnings of an evaluation, to all who want them."""
        progress, settings = self.progress, self.recipe.evaluation
        epoch = progress.epoch + 1
        values = {f"dev_{key}": value for key, value in evaluated.scores.values().items() if value is not None}
        self.tracker.log(progress.step, values, kind="eval")
        if self.ranks.is_main:
            path = self.resolved.run_dir / "predictions" / f"predictions_epoch_{epoch:03d}.csv"
            write_predictions(path, evaluated.predictions)
            shown = choose_samples(evaluated.predictions, settings.samples, self.recipe.training.seed)
            rows = [{"uid": row.uid, "reference": row.reference, "hypothesis": row.hypothesis} for row in shown]
            self.tracker.table(progress.step, "dev_samples", rows)
        best = f"  (best {settings.select_by} so far)" if is_better else ""
        self.line.echo(f"dev after epoch {epoch}: {evaluated.line()}{best}")
        self._warn(warn_of_collapse(evaluated, self.corpus, epoch, settings))

    def translate(self, split: Split) -> tuple[list[Prediction], Scores]:
        """Translate and score a split with the weights that would be kept."""
        evaluated = self._evaluated(split)
        return evaluated.predictions, evaluated.scores

    def _evaluated(self, split: Split) -> Evaluated:
        with self._kept_weights():
            return evaluate_split(self.engine, split, self.processor, self.recipe.evaluation, self.ranks)

    def save(self) -> None:
        """Begin to write a checkpoint; ``self.checkpoints.wait()`` says when it is complete."""
        with self._aside():
            self.checkpoints.save(self.engine, self.progress)

    def save_model(self, kept: Kept, scores: Scores | None) -> None:
        """Write the model as it is, or as its average is, to ``best/`` or beside it, where ``kept`` says it belongs."""
        with self._kept_weights():
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

    @contextmanager
    def _kept_weights(self) -> Iterator[None]:
        """The averaged weights where there are any, else those that are trained."""
        with averaged_weights(self.engine) if self.recipe.training.ema else nullcontext():
            yield

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Something that is no step, takes its time, and is in no step's figures."""
        with self.watch.lifted():
            yield
        self.meter.restart()

    def _warn(self, text: str | None) -> None:
        """Tell the terminal, the log (and so the report) and the trackers."""
        if text and self.ranks.is_main:
            self.line.echo(f"warning: {text}")
            log.warning(text)
            self.tracker.log(self.progress.step, {"warning": text}, kind="event")
