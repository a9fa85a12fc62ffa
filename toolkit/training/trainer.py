"""The training loop: optimizer steps, epochs, evaluations and checkpoints, on one rank of many."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import distributed as dist

from toolkit.batching.collate import IGNORED_LABEL, Batch
from toolkit.batching.loader import train_batches
from toolkit.batching.order import steps_per_epoch
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus, Split
from toolkit.errors import Interrupted
from toolkit.evaluation.generate import evaluation_mode, translate_split
from toolkit.evaluation.metrics import Scores, score
from toolkit.evaluation.predictions import Prediction, write_predictions
from toolkit.evaluation.table import choose_samples, format_score
from toolkit.evaluation.whole_weights import whole_weights
from toolkit.models.processor import PoseProcessor
from toolkit.models.tokenizers import special_ids
from toolkit.models.weights import save_model, saved_state_dict
from toolkit.planning.memory import fits_whole
from toolkit.recipe.resolve import ResolvedRun
from toolkit.tracking.progress import ProgressLine, StepFigures
from toolkit.tracking.tracker import Tracker
from toolkit.training.best_models import Kept, admit, place_model
from toolkit.training.checkpoint_writer import CheckpointWriter
from toolkit.training.checkpoints import Progress
from toolkit.training.engine import set_learning_rate
from toolkit.training.guards import GradientWatch, TrainingStopped
from toolkit.training.interruptions import Interruptions
from toolkit.training.loss import ctc_loss, token_loss
from toolkit.training.schedules import learning_rate_factor


@dataclass(frozen=True)
class Window:
    """What all ranks together bring to one optimizer step."""

    tokens: int  # target tokens that count
    clips: int
    frames: int
    padded_frames: int
    stop: bool  # whether any rank was asked to stop


class Trainer:
    """Trains one translator on one corpus.

    All ranks build one and call its methods in step.

    Args:
        engine: the DeepSpeed engine.
        peaks: peak learning rate of each of its parameter groups.
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
        peaks: list[float],
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
        self.gradient_watch: GradientWatch | None = GradientWatch(engine.module)
        self.loss = math.inf  # of the last step, nats per token
        self.train_split = corpus.splits["train"]
        self.epoch_steps = steps_per_epoch(len(self.train_split), self.recipe.training.global_batch_size)
        self.total_steps = total_steps(self.recipe.training, self.epoch_steps)
        self.line = ProgressLine(
            total_steps=self.total_steps,
            total_epochs=self.total_steps / self.epoch_steps,
            start_step=progress.step,
            log_every=self.recipe.training.log_every,
            enabled=ranks.is_main,
        )
        self.special_ids = torch.tensor(special_ids(processor.tokenizer), device=engine.device)

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: asked to stop; everything is saved.
            TrainingStopped: a guard found the run broken.
        """
        self.engine.train()
        with self.line:
            self._run()
            if not (self.resolved.run_dir / "best").exists():
                # Without a dev split nothing is ever compared: the last model is the best one known.
                self.progress.best_step = self.progress.step
                self.save_model([(self.progress.step, None)], None)

    def _run(self) -> None:
        training = self.recipe.training
        while self.progress.step < self.total_steps:
            for batches in train_batches(
                self.train_split,
                self.processor.tokenizer,
                self.resolved,
                landmark_set=self.corpus.landmark_set,
                epoch=self.progress.epoch,
                start_step=self.progress.epoch_step,
                rank=self.ranks.rank,
            ):
                stop = self.step(batches)
                ends = self.progress.epoch_step == self.epoch_steps or self.progress.step == self.total_steps
                if ends and self._evaluation_is_due():
                    self.evaluate()
                if stop or self.progress.step % training.save_every == 0 or self.progress.step == self.total_steps:
                    self.save()
                if stop and self.progress.step < self.total_steps:
                    self.checkpoints.wait()
                    reason = self.interruptions.reason or "another rank's signal"
                    raise Interrupted(
                        f"stopped by {reason} after step {self.progress.step} of {self.total_steps}; "
                        "everything is saved, the same command goes on"
                    )
                if self.progress.step == self.total_steps:
                    self.checkpoints.wait()
                    return
            self.progress.epoch += 1
            self.progress.epoch_step = 0

    def step(self, batches: Sequence[Batch]) -> bool:
        """One optimizer step over this rank's micro-batches.

        Returns:
            whether the ranks agreed to stop after it.
        """
        started = time.monotonic()
        training = self.recipe.training
        window = self._agree(batches)
        factor = learning_rate_factor(
            training.schedule, self.progress.step, self.total_steps, int(training.warmup_ratio * self.total_steps)
        )
        set_learning_rate(self.engine, self.peaks, factor)
        # DeepSpeed averages over ranks; this undoes it and divides by the global token count. It would average over a
        # fixed number of accumulation steps, too: that is turned off, as a frame budget makes their number vary.
        scale = self.ranks.world_size / max(window.tokens, 1)
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for number, batch in enumerate(batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            nll, ctc = self._losses(batch.to(self.engine.device))
            sums += torch.stack([nll.detach(), ctc.detach()]).double()
            self.engine.backward((nll + training.ctc_weight * ctc) * scale, scale_wrt_gas=False)
            if number == len(batches):
                self._check(sums, batches)
            self.engine.step()
        self._advance(window, sums, factor, time.monotonic() - started)
        return window.stop

    def _agree(self, batches: Sequence[Batch]) -> Window:
        """Sum up what all ranks are about to train on, and whether any of them wants to stop."""
        sums = torch.tensor(
            [
                sum(batch.num_target_tokens for batch in batches),
                sum(batch.num_clips for batch in batches),
                sum(batch.num_frames for batch in batches),
                sum(batch.frame_mask.numel() for batch in batches),
                self.interruptions.wanted(),
            ],
            dtype=torch.float64,
            device=self.engine.device,
        )
        dist.all_reduce(sums)
        tokens, clips, frames, padded, stop = (int(value) for value in sums.tolist())
        return Window(tokens, clips, frames, padded, stop > 0)

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

    def _advance(self, window: Window, sums: torch.Tensor, factor: float, seconds: float) -> None:
        """Count the step and tell about it."""
        progress, training = self.progress, self.recipe.training
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
            clips_per_second=window.clips / seconds,
            frames_per_second=window.frames / seconds,
            padding_share=1 - window.frames / max(window.padded_frames, 1),
        )
        self.line.update(figures)
        values = {key: value for key, value in asdict(figures).items() if key != "step" and value is not None}
        if training.ctc_weight:
            values["ctc_loss"] = ctc / max(window.tokens, 1)
        self.tracker.log(progress.step, values)

    def _evaluation_is_due(self) -> bool:
        last = self.progress.step == self.total_steps
        return bool(self.corpus.splits.get("dev")) and (
            last or (self.progress.epoch + 1) % self.recipe.training.eval_every == 0
        )

    def evaluate(self) -> Scores:
        """Translate and score the dev split; keep the model when it is the best so far."""
        epoch = self.progress.epoch + 1
        predictions, scores = self.translate(self.corpus.splits["dev"])
        self.tracker.log(
            self.progress.step,
            {f"dev_{name}": value for name, value in scores.values().items() if value is not None},
            kind="eval",
        )
        if self.ranks.is_main:
            write_predictions(self.resolved.run_dir / "predictions" / f"predictions_epoch_{epoch:03d}.csv", predictions)
            shown = choose_samples(predictions, self.recipe.evaluation.samples, self.recipe.training.seed)
            rows = [{"uid": row.uid, "reference": row.reference, "hypothesis": row.hypothesis} for row in shown]
            self.tracker.table(self.progress.step, "dev_samples", rows)
        name = self.recipe.evaluation.select_by
        step = self.progress.step
        kept = admit(self.progress.kept, step, scores, select_by=name, keep=self.recipe.training.keep_best)
        is_better = kept[0][0] == step
        named = ("bleu4", "chrf", "wer", "cer")
        listed = "  ".join(f"{key} {format_score(key, scores.values()[key])}" for key in named)
        self.line.say(f"dev after epoch {epoch}: {listed}" + (f"  (best {name} so far)" if is_better else ""))
        if is_better:
            self.progress.best = asdict(scores)
            self.progress.best_step = step
        if any(kept_step == step for kept_step, _ in kept):
            self.save_model(kept, scores)
        self.progress.kept = kept
        return scores

    def translate(self, split: Split) -> tuple[list[Prediction], Scores]:
        """Translate and score a split with the weights as they are."""
        settings = self.recipe.evaluation
        gather = self.resolved.zero_stage == 3 and fits_whole(
            self.engine,
            frames=split.frames,
            batch_frames=settings.batch_frames,
            beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
        )
        with evaluation_mode(self.engine.module), whole_weights(self.engine, gather=gather) as synced:
            predictions = translate_split(
                self.engine.module,
                split,
                self.processor,
                batch_frames=settings.batch_frames,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                synced=synced,
            )
        scores = score(
            [row.hypothesis for row in predictions],
            [row.reference for row in predictions],
            tokenize=settings.tokenize,
            lowercase=settings.lowercase,
        )
        return predictions, scores

    def save(self) -> None:
        """Begin to write a checkpoint; ``self.checkpoints.wait()`` says when it is complete."""
        self.checkpoints.save(self.engine, self.progress)

    def save_model(self, kept: Kept, scores: Scores | None) -> None:
        """Write the model as it is to ``best/``, or beside it, where ``kept`` says that it belongs."""
        weights = saved_state_dict(self.engine.module, keep=self.ranks.is_main)
        if self.ranks.is_main:
            place_model(
                self.resolved.run_dir,
                kept,
                self.progress.step,
                scores,
                lambda folder: save_model(folder, self.engine.module, self.processor, weights),
            )
        dist.barrier()


def total_steps(training: Any, epoch_steps: int) -> int:
    """Optimizer steps of a whole run."""
    steps = math.ceil(training.epochs * epoch_steps)
    return min(steps, training.max_steps) if training.max_steps else steps
