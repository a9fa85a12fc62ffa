"""How often a training step makes the host wait for a GPU, counted where there is none; and what is logged late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.scripts import load_script
from tests.training.small_trainers import batches_of, group, make, watched
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.training.trainer import Trainer

__all__ = ["group", "make"]

STEPS = 3


@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_waits_once(make: Callable[..., Trainer], micro_batches: int, stage: int) -> None:
    """The first one, too, whose gradients are guarded and whose costs are recorded."""
    trainer = make(f"ds.zero_optimization.stage={stage}", "training.ema=null")
    use_gpu_layers(trainer.engine.module)
    batches = next(batches_of(trainer))[:1] * micro_batches
    with load_script("benchmarks/operator_calls.py").Calls() as calls:
        for step in range(STEPS):
            trainer.engine.norm = torch.tensor(float(step))
            trainer.step(batches)
    waits = {key: count for key, count in calls.waits.items() if key[0] not in ("tests", "torch/optim")}
    assert sum(waits.values()) == STEPS, waits


def test_what_makes_a_host_wait_is_counted() -> None:
    accelerator = get_accelerator()
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with load_script("benchmarks/operator_calls.py").Calls() as calls:
        for read in (
            lambda: values[0].item(),
            lambda: bool(values.sum() > 1),
            lambda: values.tolist(),
            lambda: values.cpu(),
            lambda: values[mask],
            lambda: mask.nonzero(),
            lambda: torch.equal(values, values),
            lambda: torch.tensor([1.0], device=values.device),
            lambda: accelerator.synchronize(),
        ):
            before = sum(calls.waits.values())
            read()
            assert sum(calls.waits.values()) == before + 1
        values.where(mask, 0.0).sum()
        values.index_select(0, torch.tensor([0, 2]))
        assert sum(calls.waits.values()) == before + 1
    assert {package for package, _, _ in calls.waits} == {"tests"}


def rows_of(calls: Any) -> list[tuple[int, float | None]]:
    return [
        (call.args[0], call.args[1].get("grad_norm")) for call in calls.tracker.log.call_args_list if not call.kwargs
    ]


def test_a_norm_that_is_on_the_device_is_logged_with_its_own_step(make: Callable[..., Trainer]) -> None:
    """It is read with the figures of the step after it; the last one before an evaluation, a save and the end."""
    trainer = make("training.max_steps=5", "training.save_every=2", "ds.zero_optimization.stage=1")
    calls = watched(trainer, "tracker", "line")
    take_step, save = trainer.engine.step, trainer.checkpoints.save
    logged: list[list[int]] = []

    def step() -> None:
        take_step()
        logged.append([number for number, _ in rows_of(calls)])
        trainer.engine.norm = torch.tensor(10.0 + trainer.engine.steps)

    def saved(*arguments: Any) -> None:
        logged.append([number for number, _ in rows_of(calls)])
        save(*arguments)

    trainer.engine.step, trainer.checkpoints.save = step, saved  # type: ignore[method-assign]
    trainer.run(batches_of(trainer))
    assert rows_of(calls) == [(step, 10.0 + step) for step in range(1, 6)]
    assert logged == [[], [1], [1, 2], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    losses = [call.args[1]["loss"] for call in calls.tracker.log.call_args_list if not call.kwargs]
    assert len(set(losses)) == 5 and losses[-1] == trainer.loss


def test_a_norm_is_logged_before_the_run_is_stopped(make: Callable[..., Trainer]) -> None:
    trainer = make("ds.zero_optimization.stage=1")
    calls = watched(trainer, "tracker", "line")
    stream = batches_of(trainer)
    trainer.engine.norm = torch.tensor(7.0)
    trainer.step(next(stream))
    broken = next(stream)
    broken[0].poses[:] = torch.inf
    with pytest.raises(Exception, match="step 2"):
        trainer.step(broken)
    assert rows_of(calls) == [(1, 7.0)]
