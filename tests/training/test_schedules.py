"""Learning-rate schedules, in optimizer steps."""

from __future__ import annotations

import pytest

from toolkit.training.schedules import learning_rate_factor

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
def test_ends_at_nothing_and_stays_there(schedule: str) -> None:
    assert learning_rate_factor(schedule, 100, 100, 10) == pytest.approx(0.0)
    assert learning_rate_factor(schedule, 150, 100, 10) == pytest.approx(0.0)


def test_inverse_square_root_halves_when_steps_quadruple() -> None:
    assert learning_rate_factor("inverse_sqrt", 43, 1000, 10) == pytest.approx(0.5)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="sawtooth"):
        learning_rate_factor("sawtooth", 5, 10, 0)
