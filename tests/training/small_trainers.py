"""A trainer whose engine is plain torch, for tests of the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from tests.process_groups import group_of_one
from toolkit.checkpointing.checkpoints import Progress
from toolkit.cluster.ranks import read_ranks
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_processor, build_translator
from toolkit.recipe.resolve import ResolvedRun
from toolkit.tracking.tracker import Tracker
from toolkit.training.monitoring.metering import StepCounts
from toolkit.training.optimization.optimizers import parameter_groups
from toolkit.training.run import start_loader
from toolkit.training.trainer import Trainer

SMALL = (
    *("model.tokenizer=bytes", "model.tiny=true", "model.dropout=0", "model.pose_encoder.dropout=0"),
    *("training.global_batch_size=3", "training.micro_batch_size=2", "training.workers=0", "training.save_every=99"),
    *("training.label_smoothing=0", "training.ctc_weight=0", "evaluation.ctc_weight=0", "training.epochs=3"),
)
SPEED = {
    **{f"{name}_per_second": 1.0 for name in ("clips", "frames", "tokens")},
    **dict.fromkeys(("padding_share", "data_wait_share", "memory_gib"), 0.0),
}


class Engine:
    """A DeepSpeed engine as far as the trainer uses it, on one rank at stage 0 or 1; notes what it gets."""

    device = torch.device("cpu")
    dp_world_size = 1
    enable_backward_allreduce = False  # of one rank

    def __init__(self, module: nn.Module, resolved: ResolvedRun) -> None:
        self.module = module
        self.clipping = resolved.deepspeed["gradient_clipping"]
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(parameter_groups(module, resolved))
        self.steps = 0
        self.losses: list[float] = []  # of the backward passes
        self.boundaries: list[bool] = []  # whether each was the last one of its step
        self.rates: list[list[float]] = []  # learning rate of each group in each step
        self.is_boundary = False
        self.norm: float | torch.Tensor = 123.0  # of the last step
        self.applies = True  # whether the optimizer steps, or finds a gradient that is not finite
        self.global_steps = self.skipped_steps = 0

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self) -> None:
        self.module.train()

    def zero_optimization_stage(self) -> int:
        return 0

    def torch_autocast_enabled(self) -> bool:
        return False

    def gradient_clipping(self) -> float:
        return self.clipping

    def set_gradient_accumulation_boundary(self, value: bool) -> None:
        self.is_boundary = value

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas, "the trainer divides by the tokens of the step itself"
        self.losses.append(loss.item())
        self.boundaries.append(self.is_boundary)
        loss.backward()

    def get_global_grad_norm(self) -> float | torch.Tensor:
        return self.norm

    def step(self) -> None:
        assert self.is_boundary, "a step follows the last micro-batch"
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        if self.applies:
            self.optimizer.step()
        self.zero_grad()
        self.steps += 1

    def was_step_applied(self) -> bool:
        return self.applies

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Checkpoints:
    """Notes what would be saved."""

    models = frozenset({7})  # steps of the models that checkpoints list

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.kept: list[Any] = []  # the models that each one lists
        self.waits = 0

    def save(self, engine: Engine, progress: Progress) -> None:
        self.saved.append(progress.step)
        self.kept.append(progress.kept)

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
    def make(*overrides: str, progress: Progress | None = None, interruptions: Any = None, **settings: Any) -> Trainer:
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
            progress=progress or Progress(),
            **fakes,
            **settings,
        )

    return make


def batches_of(trainer: Trainer) -> Any:
    """The batches of its run, without end."""
    batches = start_loader(trainer.resolved, trainer.ranks, trainer.corpus, trainer.progress)
    batches.set_tokenizer(trainer.processor.tokenizer)
    return batches


def watched(trainer: Trainer, *parts: str) -> Any:
    """Replace parts of a trainer by mocks whose calls are noted in one list, in their order."""
    calls = MagicMock()
    for part in parts:
        setattr(trainer, part, getattr(calls, part))
    counts = StepCounts(tokens=8, clips=3, frames=9, padded_frames=9, flops=0, waited=0)
    calls.meter.begin.return_value = torch.tensor(astuple(counts), dtype=torch.float64)
    calls.gradient_guard.count.return_value = torch.zeros(())
    calls.meter.end.return_value = (2.5, SPEED)
    calls.loss_spikes.see.return_value = None
    return calls


def names_of(calls: Any, *left_out: str) -> list[str]:
    """What was called, in order, without context managers' own methods."""
    names = [name for name, *_ in calls.mock_calls if "()" not in name and "__" not in name]
    return [name for name in names if name not in left_out]
