"""Ranks hold their whole gradient where it is small and its sums stay exact; a failed step reduces nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.training.optimization import joined_gradients
from toolkit.training.optimization.gradient_reduction import (
    LARGEST_WHOLE_GRADIENT,
    When,
    backward,
    count_no_hooks,
    forget_gradients_at_once,
    reduced_once,
    skip_sums_of_one_rank,
    when_reduced,
)


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
        joins: bool = False,
    ) -> None:
        self.module = nn.Linear(size, 1, bias=False, dtype=dtype, device="meta")
        self.dp_world_size = ranks
        self.zero_optimization_stage = lambda: stage
        self.is_deepcompile_active = lambda: compiled
        self.zero_grad: Callable[[], None]
        self.fails = False
        self.events: list[Any] = []
        if joins:
            setattr(self, joined_gradients.FLUSH, None)
        self.set_gradient_accumulation_boundary = lambda value: self.events.append(("boundary", value))

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        if self.fails:
            raise ValueError("memory")
        self.events.append("backward")

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        self.events.append("begin")
        try:
            yield
        finally:
            self.events.append("reduced")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_small_gradient_in_fp32_is_reduced_once_a_step(stage: int) -> None:
    assert when_reduced(Engine(stage=stage)) == "once a step"
    assert when_reduced(Engine(stage=stage, size=LARGEST_WHOLE_GRADIENT // 4)) == "once a step"


@pytest.mark.parametrize(("stage", "ranks", "once"), [(1, 1, True), (1, 2, True), (2, 1, True), (2, 2, False)])
def test_a_large_gradient_that_is_whole_anyway_is_reduced_once_where_it_is_joined(
    stage: int, ranks: int, once: bool
) -> None:
    """A single rank's partition is all of it."""
    large: dict[str, Any] = {"size": LARGEST_WHOLE_GRADIENT, "stage": stage, "ranks": ranks}
    assert (when_reduced(Engine(**large, joins=True)) == "once a step") == once
    assert when_reduced(Engine(**large)) == "as they come"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_small_gradient_in_bf16_is_joined_after_each_pass(ranks: int) -> None:
    """Its sums over micro-batches are in fp32, in the partition."""
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "ranks": ranks}
    assert when_reduced(Engine(**kind, joins=True)) == "after each pass"
    assert when_reduced(Engine(**kind, joins=True, size=LARGEST_WHOLE_GRADIENT)) == "as they come"


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
        {"compiled": True, "joins": True},
    ],
)
def test_any_other_gradient_is_reduced_as_it_comes(reason: dict[str, Any]) -> None:
    assert when_reduced(Engine(**reason)) == "as they come"


def test_frozen_weights_do_not_count() -> None:
    engine = Engine(size=LARGEST_WHOLE_GRADIENT)
    engine.module.requires_grad_(False)
    engine.module.register_parameter("adapter", nn.Parameter(torch.zeros(4)))
    engine.module.register_parameter("packed", nn.Parameter(torch.zeros(4).bfloat16(), requires_grad=False))
    assert when_reduced(engine) == "once a step"


def passes(engine: Engine, when: When, micro_batches: int) -> list[Any]:
    """What the engine is asked for in the passes of a step."""
    with reduced_once(engine, when, micro_batches):
        for _ in range(micro_batches):
            backward(engine, torch.zeros(()), when)
    return engine.events


def test_gradients_are_reduced_after_the_last_micro_batch() -> None:
    assert passes(Engine(), "once a step", 2) == ["begin", "backward", "backward", "reduced", ("boundary", True)]


@pytest.mark.parametrize("joins", [False, True])
def test_a_single_micro_batch_is_left_to_deepspeed_unless_gradients_are_joined(joins: bool) -> None:
    found = passes(Engine(joins=joins), "once a step", 1)
    assert found == (["begin", "backward", "reduced", ("boundary", True)] if joins else ["backward"])


def test_gradients_are_reduced_after_each_pass() -> None:
    each = ["begin", "backward", "reduced", ("boundary", True)]
    assert passes(Engine(joins=True), "after each pass", 2) == 2 * each


def test_a_partitioned_gradient_is_left_to_deepspeed() -> None:
    assert passes(Engine(joins=True), "as they come", 2) == ["backward", "backward"]


@pytest.mark.parametrize("when", ["once a step", "after each pass"])
def test_a_failed_step_starts_no_collective(when: When) -> None:
    engine = Engine()
    engine.fails = True
    with pytest.raises(ValueError, match="memory"):
        passes(engine, when, 2)
    assert engine.events == ["begin"]


@pytest.mark.parametrize(
    ("stage", "ranks", "sums_as_they_come", "is_sent"),
    [(0, 1, False, False), (1, 1, False, False), (0, 2, False, True), (1, 1, True, True), (2, 1, True, True)],
)
def test_a_single_rank_sends_its_gradients_nowhere(
    stage: int, ranks: int, sums_as_they_come: bool, is_sent: bool
) -> None:
    engine: Any = Engine(stage=stage)
    engine.enable_backward_allreduce = True
    engine.optimizer = SimpleNamespace(**({"reduce_gradients": None} if sums_as_they_come else {}))
    skip_sums_of_one_rank(engine, ranks)
    assert engine.enable_backward_allreduce == is_sent


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_are_not_counted_in_backward_passes_of_the_engine(stage: int) -> None:
    """Where torch starts one by itself DeepSpeed has no other way to know its end; stage 3 reads the count."""
    deepspeed = pytest.importorskip("deepspeed.runtime.base_optimizer")
    engine: Any = Engine(stage=stage)
    optimizer = engine.optimizer = deepspeed.ZeROOptimizer()
    count_no_hooks(engine)
    assert optimizer.should_refresh_expected_hook_count()
    optimizer.enter_backward()
    assert bool(optimizer.should_refresh_expected_hook_count()) == (stage == 3)
    optimizer.exit_backward()
    assert optimizer.should_refresh_expected_hook_count()


@pytest.mark.parametrize("stage", [0, 3])
def test_other_optimizers_are_left_as_they_are(stage: int) -> None:
    engine: Any = Engine(stage=stage)
    engine.optimizer = SimpleNamespace()
    count_no_hooks(engine)
    assert vars(engine.optimizer) == {}


def test_gradients_are_forgotten_without_a_walk_through_the_model() -> None:
    """Those of frozen weights, too, which trained before."""
    engine, walks = Engine(), []
    engine.module.register_parameter("frozen", nn.Parameter(torch.zeros(4)))
    parameters = list(engine.module.parameters())
    forget_gradients_at_once(engine)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    engine.module.frozen.requires_grad_(False)
    engine.module.named_parameters = lambda **_: walks.append(1)  # type: ignore[method-assign]
    engine.zero_grad()
    assert all(parameter.grad is None for parameter in parameters) and not walks
