"""Learning-rate schedules, in optimizer steps."""

from __future__ import annotations

import itertools

import pytest

from toolkit.checkpointing.checkpoints import Extension
from toolkit.recipe.load import load_recipe
from toolkit.recipe.schema import Training
from toolkit.training.optimization.schedules import extended, learning_rate_factor, scheduled_factor

SCHEDULES = ["linear", "cosine", "constant", "inverse_sqrt"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_to_the_peak_and_never_beyond(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, step, 100, 10) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < 0.2
    assert factors[10] == pytest.approx(1.0)
    assert max(factors) <= 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert learning_rate_factor(schedule, 0, 10, 0) == pytest.approx(1.0)


@pytest.mark.parametrize(("schedule", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_halfway(schedule: str, halfway: float) -> None:
    assert learning_rate_factor(schedule, 55, 100, 10) == pytest.approx(halfway)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_ends_at_0_and_stays_there(schedule: str) -> None:
    assert learning_rate_factor(schedule, 100, 100, 10) == pytest.approx(0.0)
    assert learning_rate_factor(schedule, 150, 100, 10) == pytest.approx(0.0)


def test_inverse_square_root_halves_when_steps_quadruple() -> None:
    assert learning_rate_factor("inverse_sqrt", 43, 1000, 10) == pytest.approx(0.5)


def training_of(*overrides: str) -> Training:
    return load_recipe("demo", [*overrides]).training


def factors(training: Training, first: int, total: int, extension: Extension | None = None) -> list[float]:
    return [scheduled_factor(training, step, total, extension) for step in range(first, total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_was_never_extended_follows_its_schedule(schedule: str) -> None:
    training = training_of(f"training.schedule={schedule}", "training.warmup_ratio=0.1")
    assert factors(training, 0, 50) == [learning_rate_factor(schedule, step, 50, 5) for step in range(50)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("done", [100, 60])
def test_an_extended_run_rises_without_a_jump_to_the_schedule_of_the_longer_one(schedule: str, done: int) -> None:
    training = training_of(f"training.schedule={schedule}", "training.warmup_ratio=0.1")
    reached = scheduled_factor(training, done, 100, None)
    extension = extended(training, done, 100, 200, None)
    rise = (200 - done) // 10
    found = factors(training, done, 200, extension)
    longer = [learning_rate_factor(schedule, step, 200, 10) for step in range(done, 200)]
    assert found[rise:] == pytest.approx(longer[rise:])
    assert found[:rise] == sorted(found[:rise])
    largest = (longer[0] - reached) / rise
    assert reached < found[0] <= reached + largest
    assert all(later - earlier <= largest for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_schedule_without_an_end_is_the_same_after_an_extension(schedule: str) -> None:
    training = training_of(f"training.schedule={schedule}", "training.warmup_ratio=0.1")
    extension = extended(training, 100, 100, 200, None)
    expected = [learning_rate_factor(schedule, step, 200, 10) for step in range(100, 200)]
    assert factors(training, 100, 200, extension) == pytest.approx(expected)


def test_in_its_first_warm_up_a_run_keeps_that_warm_up() -> None:
    training = training_of("training.schedule=linear", "training.warmup_ratio=0.1")
    extension = extended(training, 4, 100, 300, None)
    longer = [learning_rate_factor("linear", step, 300, 10) for step in range(4, 300)]
    assert factors(training, 4, 300, extension) == longer


def test_an_extension_can_be_extended() -> None:
    training = training_of("training.schedule=linear", "training.warmup_ratio=0.1")
    once = extended(training, 100, 100, 200, None)
    twice = extended(training, 105, 200, 400, once)  # while the rate was rising
    reached = scheduled_factor(training, 105, 200, once)
    found = factors(training, 105, 400, twice)
    assert found[0] == pytest.approx(reached, abs=0.05) and found[0] > reached
    assert found[40] == pytest.approx(learning_rate_factor("linear", 145, 400, 10))
    assert twice.warmup_steps == 10


def test_the_last_rate_of_an_extended_run_is_0() -> None:
    training = training_of("training.schedule=cosine")
    assert scheduled_factor(training, 200, 200, extended(training, 100, 100, 200, None)) == pytest.approx(0.0)
