"""Ranks hold their whole gradient where it is small and its sums stay exact; a failed step reduces nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.training.optimization.gradient_reduction import LARGEST_WHOLE_GRADIENT, holds_whole_gradient, reduced_once


class Engine:
    """A DeepSpeed engine, as far as this module reads it."""

    def __init__(
        self,
        *,
        stage: int = 2,
        ranks: int = 2,
        dtype: torch.dtype = torch.float32,
        size: int = 8,
        compiled: bool = False,
    ) -> None:
        self.module = nn.Linear(size, 1, bias=False, dtype=dtype, device="meta")
        self.dp_world_size = ranks
        self.zero_optimization_stage = lambda: stage
        self.is_deepcompile_active = lambda: compiled
        self.events: list[Any] = []
        self.set_gradient_accumulation_boundary = lambda value: self.events.append(("boundary", value))

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        self.events.append("begin")
        try:
            yield
        finally:
            self.events.append("reduced")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_small_gradient_in_fp32_is_held(stage: int) -> None:
    assert holds_whole_gradient(Engine(stage=stage))
    assert holds_whole_gradient(Engine(stage=stage, size=LARGEST_WHOLE_GRADIENT // 4))


@pytest.mark.parametrize(
    "reason",
    [
        {"stage": 0},  # reduces once a step already
        {"stage": 1},
        {"ranks": 1},  # reduces nothing
        {"dtype": torch.bfloat16},  # would be summed in bf16
        {"dtype": torch.float16},
        {"size": LARGEST_WHOLE_GRADIENT // 4 + 1},
        {"compiled": True},
    ],
)
def test_any_other_gradient_is_partitioned(reason: dict[str, Any]) -> None:
    assert not holds_whole_gradient(Engine(**reason))


def test_frozen_weights_do_not_count() -> None:
    engine = Engine(size=LARGEST_WHOLE_GRADIENT)
    engine.module.requires_grad_(False)
    engine.module.register_parameter("adapter", nn.Parameter(torch.zeros(4)))
    engine.module.register_parameter("packed", nn.Parameter(torch.zeros(4).bfloat16(), requires_grad=False))
    assert holds_whole_gradient(engine)


def test_gradients_are_reduced_after_the_last_micro_batch() -> None:
    engine = Engine()
    with reduced_once(engine, 2):
        engine.events.append("backward")
    assert engine.events == ["begin", "backward", "reduced", ("boundary", True)]


def test_a_single_micro_batch_is_left_to_deepspeed() -> None:
    engine = Engine()
    with reduced_once(engine, 1):
        pass
    assert engine.events == []


def test_a_failed_step_starts_no_collective() -> None:
    engine = Engine()
    with pytest.raises(ValueError, match="memory"), reduced_once(engine, 2):
        raise ValueError("memory")
    assert engine.events == ["begin"]
