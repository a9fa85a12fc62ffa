"""A micro-batch that runs out of memory is computed in halves where that changes nothing else, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.small_trainers import batches_of, group, make
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.resolve import read_choice
from toolkit.training.trainer import Trainer

__all__ = ["group", "make"]
CHOICE = MicroBatchChoice(3, None, "chosen", "here", "settings")


@pytest.fixture
def run(make: Callable[..., Trainer], monkeypatch: Any, tmp_path: Any) -> Callable[..., tuple[Trainer, list[int]]]:
    """A trainer with three clips in a micro-batch, and the clips of each forward pass; some pass fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(fails: Callable[[int, int], bool], *, stage: int = 1, ranks: int = 1, choice: Any = CHOICE) -> Any:
        trainer = make("training.micro_batch_size=3")
        config = {**trainer.resolved.deepspeed, "zero_optimization": {"stage": stage}}
        resolved = replace(trainer.resolved, choice=choice, world_size=ranks, deepspeed=config)
        trainer.halving.resolved = resolved
        passes: list[int] = []
        compute = trainer._losses

        def losses(batch: Any) -> Any:
            passes.append(len(batch))
            if fails(len(batch), len(passes)):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(batch)

        trainer._losses = losses
        step = trainer.engine.step

        def kept() -> None:
            trainer.engine.gradients = [weight.grad.clone() for weight in trainer.weights]
            step()

        trainer.engine.step = kept
        return trainer, passes

    return run


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    found: list[torch.Tensor] = trainer.engine.gradients
    return found


def test_a_step_in_halves_has_the_gradient_of_one_that_fits(run: Any) -> None:
    whole, _ = run(lambda *_: False)
    whole.step(next(batches_of(whole)))
    trainer, passes = run(lambda clips, _: clips == 3)
    batches = batches_of(trainer)
    trainer.step(next(batches))
    assert passes == [3, 1, 2]
    assert trainer.loss == pytest.approx(whole.loss, rel=1e-5)
    assert trainer.engine.boundaries == [False, True]
    for one, other in zip(gradients(trainer), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    found = read_choice(trainer.resolved.run_dir)
    assert found and found.too_large, "the next start takes smaller ones"
    assert trainer.halving.too_large is not None
    trainer.step(next(batches))
    assert passes[3:] in ([1, 2], [3, 1, 2]), "a micro-batch that is as large is not tried again"


@pytest.mark.parametrize(
    "settings",
    [{"choice": None}, {"ranks": 2, "stage": 2}, {"ranks": 2, "stage": 3}],
    ids=["number", "stage 2", "stage 3"],
)
def test_elsewhere_the_run_ends(run: Any, settings: dict[str, Any]) -> None:
    trainer, passes = run(lambda clips, _: clips == 3, **settings)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(next(batches_of(trainer)))
    assert passes == [3]


def test_a_step_is_taken_again_once(run: Any) -> None:
    trainer, passes = run(lambda _, number: number in (1, 3))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(next(batches_of(trainer)))
    assert passes == [3, 1, 2]


def test_another_error_is_none_of_memory(run: Any) -> None:
    trainer, _ = run(lambda *_: False)

    def fails(batch: Any) -> Any:
        raise RuntimeError("shapes do not match")

    trainer._losses = fails
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.step(next(batches_of(trainer)))
