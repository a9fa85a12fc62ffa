"""A loss that jumps out of its noise is warned of."""

from __future__ import annotations

import random

import pytest

from toolkit.training.monitoring.loss_spikes import LossSpikes


def test_a_jump_is_reported_once_with_its_likely_causes() -> None:
    spikes, rng = LossSpikes(), random.Random(0)
    assert not any(spikes.see(step, 3 - step / 100 + rng.gauss(0, 0.05), 1.2) for step in range(60))
    warning = spikes.see(60, 9.0, 40.0)
    assert warning is not None and "\n" not in warning
    assert all(part in warning for part in ("9.000", "step 60", "norm 40", "training.learning_rate"))
    assert spikes.see(61, 9.5, 40.0) is None


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_noise_is_no_spike(noise: float) -> None:
    spikes, rng = LossSpikes(), random.Random(1)
    assert not any(spikes.see(step, 2.0 + abs(rng.gauss(0, noise)), None) for step in range(500))


def test_the_first_steps_are_never_judged() -> None:
    spikes = LossSpikes()
    assert not any(spikes.see(step, loss, None) for step, loss in enumerate([1.0] * 10 + [100.0]))
