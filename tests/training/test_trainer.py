"""The training loop with an engine of plain torch: one step, what stops a run, and what is saved then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.process_groups import group_of_one
from toolkit.checkpointing.checkpoints import Progress
from toolkit.cluster.ranks import read_ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import Interrupted
from toolkit.models.build import build_processor, build_translator
from toolkit.recipe.resolve import ResolvedRun
from toolkit.tracking.tracker import Tracker
from toolkit.training.monitoring.gradient_guard import TrainingStopped
from toolkit.training.optimization.optimizers import parameter_groups
from toolkit.training.run import start_loader
from toolkit.training.trainer import Trainer

SMALL = (
    *("model.tokenizer=bytes", "model.tiny=true", "model.dropout=0", "model.pose_encoder.dropout=0"),
    *("training.global_batch_size=3", "training.micro_batch_size=2", "training.workers=0", "training.save_every=99"),
    *("training.label_smoothing=0", "training.ctc_weight=0", "evaluation.ctc_weight=0", "training.epochs=3"),
)


class Engine:
    """A DeepSpeed engine as far as the trainer uses it, on one rank at stage 0 or 1."""

    device = torch.device("cpu")
    dp_world_size = 1

    def __init__(self, module: nn.Module, resolved: ResolvedRun) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW(parameter_groups(module, resolved))
        self.steps = 0
        self.is_boundary = False

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self) -> None:
        self.module.train()

    def zero_optimization_stage(self) -> int:
        return 0

    def set_gradient_accumulation_boundary(self, value: bool) -> None:
        self.is_boundary = value

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas, "the trainer divides by the tokens of the step itself"
        loss.backward()

    def get_global_grad_norm(self) -> float:
        return 123.0

    def step(self) -> None:
        assert self.is_boundary, "a step follows the last micro-batch"
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


class Checkpoints:
    """Counts what would be saved."""

    models: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.waits = 0

    def save(self, engine: Engine, progress: Progress) -> None:
        self.saved.append(progress.step)

    def wait(self) -> None:
        self.waits += 1


class Stops:
    """A request to stop after some steps."""

    def __init__(self, after: float = math.inf) -> None:
        self.after = after
        self.reason: str | None = None

    def wanted(self) -> bool:
        self.after -= 1
        self.reason = "SIGTERM" if self.after <= 0 else None
        return self.reason is not None


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with group_of_one(tmp_path):
        yield


@pytest.fixture
def make(resolve: Callable[..., ResolvedRun], corpus: Corpus) -> Callable[..., Trainer]:
    def make(*overrides: str, interruptions: Stops | None = None, **settings: Any) -> Trainer:
        resolved = resolve(*SMALL, *overrides)
        resolved.run_dir.mkdir(exist_ok=True)
        torch.manual_seed(0)
        processor = build_processor(resolved.recipe, corpus)
        engine = Engine(build_translator(resolved, corpus, processor.tokenizer), resolved)
        fakes: Any = {"checkpoints": Checkpoints(), "interruptions": interruptions or Stops()}
        return Trainer(
            engine,
            [(group["name"], group["lr"]) for group in engine.optimizer.param_groups],
            resolved=resolved,
            ranks=read_ranks(),
            corpus=corpus,
            processor=processor,
            tracker=Tracker([]),
            progress=Progress(),
            **fakes,
            **settings,
        )

    return make


def batches_of(trainer: Trainer) -> Any:
    batches = start_loader(trainer.resolved, trainer.ranks, trainer.corpus, trainer.progress)
    batches.set_tokenizer(trainer.processor.tokenizer)
    return batches


def test_a_step_has_the_mean_loss_and_gradient_of_all_its_tokens(make: Callable[..., Trainer]) -> None:
    trainer = make("ds.zero_optimization.stage=0")
    batches = next(batches_of(trainer))
    assert len(batches) == 2
    tokens, loss = 0, torch.zeros(())
    for batch in batches:
        inputs = {key: getattr(batch, key) for key in ("poses", "visible", "frame_mask", "labels")}
        logits = trainer.engine(**inputs).logits
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        tokens += batch.num_target_tokens
    parameters = list(trainer.engine.module.parameters())
    gradients = torch.autograd.grad(loss / tokens, parameters)
    norms: list[float] = []
    trainer._log_step = lambda speed, rate, norm, ctc: norms.append(norm)  # type: ignore[method-assign]
    assert trainer.step(batches) is False
    assert trainer.loss == pytest.approx(loss.item() / tokens, rel=1e-5)
    assert norms == pytest.approx([float(nn.utils.get_total_norm(gradients))], rel=1e-4)
    progress = trainer.progress
    assert (progress.step, progress.epoch_step, progress.clips, trainer.engine.steps) == (1, 1, 3, 1)


def test_above_stage_0_the_norm_is_that_of_deepspeed(make: Callable[..., Trainer]) -> None:
    trainer = make("ds.zero_optimization.stage=1")
    norms: list[float] = []
    trainer._log_step = lambda speed, rate, norm, ctc: norms.append(norm)  # type: ignore[method-assign]
    trainer.step(next(batches_of(trainer)))
    assert norms == [123.0]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(make: Callable[..., Trainer]) -> None:
    trainer = make()
    batches = next(batches_of(trainer))
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    batches[1].poses[:] = math.inf
    with pytest.raises(TrainingStopped, match="step 1") as stopped:
        trainer.step(batches)
    listed = (trainer.resolved.run_dir / "not_finite_rank_00.txt").read_text().split()
    assert sorted(listed) == sorted(uid for batch in batches for uid in batch.uids)
    assert "training.learning_rate" in stopped.value.hint
    assert trainer.engine.steps == 0 and trainer.progress.step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.module.state_dict().items())


def test_a_request_to_stop_saves_the_step_and_ends_the_run(make: Callable[..., Trainer]) -> None:
    trainer = make(interruptions=Stops(after=2))
    with pytest.raises(Interrupted, match=r"SIGTERM .*step 2 .*\b6$"):
        trainer.run(batches_of(trainer))
    assert trainer.checkpoints.saved == [2] and trainer.checkpoints.waits == 1  # type: ignore[attr-defined]


def test_a_request_in_the_last_step_does_not_interrupt(make: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make("training.max_steps=2", interruptions=Stops(after=2))
    trainer.run(batches_of(trainer))
    assert trainer.checkpoints.saved == [2]  # type: ignore[attr-defined]
    assert trainer.progress.kept == [(2, None)], "without a dev split the last model is kept"
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_a_target_loss_ends_the_run(make: Callable[..., Trainer]) -> None:
    trainer = make(target_loss=math.inf)
    trainer.run(batches_of(trainer))
    assert trainer.progress.step == trainer.total_steps == 1


def test_evaluations_without_a_better_one_end_the_run(make: Callable[..., Trainer]) -> None:
    trainer = make("training.early_stopping=2", "training.eval_every=1")
    trainer.corpus.splits["dev"] = trainer.corpus.splits["test"]
    trainer.progress.kept = [(1, 0.5)]

    def evaluate() -> None:
        trainer.progress.evaluations_since_best += 1

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    trainer.run(batches_of(trainer))
    assert (trainer.progress.step, trainer.progress.epoch) == (4, 1), "two epochs of two steps, of three"
    assert trainer.checkpoints.saved == [4]  # type: ignore[attr-defined]
    assert trainer.progress.kept == [(1, 0.5)]


def test_leaving_a_trainer_closes_what_was_opened_for_it(make: Callable[..., Trainer]) -> None:
    closed: list[str] = []
    with make() as trainer:
        trainer.on_exit.callback(closed.append, "first")
        trainer.on_exit.callback(closed.append, "last")
        assert closed == []
    assert closed == ["last", "first"]
