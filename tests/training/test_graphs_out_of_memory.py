"""Passes as CUDA graphs where memory is short: what they leave, what the graphs give back, and which step is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.recorded_calls import RecordedCalls
from tests.training.small_trainers import batches_of, group, make
from tests.training.test_halving import CHOICE
from tests.training.test_pass_graphs import GRAPHS, capture, losses_of, written
from toolkit.batching.collate import Batch
from toolkit.recipe.resolve import read_choice
from toolkit.training import pass_graphs
from toolkit.training.trainer import Trainer

__all__ = ["capture", "group", "make"]
ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB"

Make = Callable[..., Trainer]


def fails_where(trainer: Trainer, is_short: Callable[[Batch], bool], *, in_backward: bool) -> None:
    """Have passes as they are written run out of memory, in the forward pass or in the backward pass."""
    graphs: Any = trainer.graphs
    own = graphs.losses

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    def losses(batch: Batch, model: Any) -> Any:
        if not is_short(batch):
            return own(batch, model)
        if not in_backward:
            fail()
        nll, ctc = own(batch, model)
        nll.register_hook(fail)
        return nll, ctc

    graphs.losses = losses


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_pass_gets_the_memory_of_the_graphs(
    make: Make, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch, caplog: Any, in_backward: bool
) -> None:
    monkeypatch.setattr(pass_graphs, "MOST_GRAPHS", 1)
    trainer = make(*GRAPHS)
    graphs: Any = trainer.graphs
    fails_where(trainer, lambda _: bool(graphs.graphs), in_backward=in_backward)
    with caplog.at_level(logging.WARNING, logger="toolkit"):
        losses = losses_of(trainer)
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(said) == 1 and ERROR in said[0] and capture.captured
    assert not graphs.graphs and not graphs.inputs and graphs.capture is None and graphs.out_of_memory
    assert losses == pytest.approx(written(make, monkeypatch), rel=1e-5)


def test_a_shape_whose_inputs_find_no_memory_runs_as_it_is_written(
    make: Make, capture: RecordedCalls, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    trainer = make(*GRAPHS)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    monkeypatch.setattr(trainer.graphs, "_copy", fail)
    with caplog.at_level(logging.WARNING, logger="toolkit"):
        losses = losses_of(trainer)
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(said) == 1 and ERROR in said[0]
    assert losses == pytest.approx(written(make, monkeypatch), rel=1e-5)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_micro_batch_that_was_chosen_is_halved(
    make: Make, capture: RecordedCalls, monkeypatch: Any, tmp_path: Any, in_backward: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trainer = make(*GRAPHS)
    trainer.halving.resolved = replace(trainer.resolved, choice=CHOICE)
    fails_where(trainer, lambda batch: len(batch) > 1, in_backward=in_backward)
    assert losses_of(trainer) == pytest.approx(written(make, monkeypatch), rel=1e-5)
    assert trainer.halving.halved_in == 1
    found = read_choice(trainer.resolved.run_dir)
    assert found and found.too_large, "the next start takes smaller ones"


def test_a_number_of_clips_ends_the_run(make: Make, capture: RecordedCalls) -> None:
    trainer = make(*GRAPHS)
    fails_where(trainer, lambda batch: len(batch) > 1, in_backward=False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(next(batches_of(trainer)))
