"""Warnings: a loss that jumps out of its noise, outputs that are all alike."""

from __future__ import annotations

import random

import pytest

from toolkit.training.monitoring.loss_spikes import LossSpikes, collapse_warning


def test_a_jump_is_told_once_with_its_likely_causes() -> None:
    watch, rng = LossSpikes(), random.Random(0)
    told = [watch.see(step, 3 - step / 100 + rng.gauss(0, 0.05), 1.2) for step in range(60)]
    assert not any(told)
    warning = watch.see(60, 9.0, 40.0)
    assert warning is not None
    assert "jumped to 9.000 at step 60" in warning and "gradient norm 40" in warning
    assert "training.learning_rate" in warning and "\n" not in warning
    assert watch.see(61, 9.5, 40.0) is None


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_noise_is_no_spike(noise: float) -> None:
    watch, rng = LossSpikes(), random.Random(1)
    assert not any(watch.see(step, 2.0 + abs(rng.gauss(0, noise)), None) for step in range(500))


def test_the_first_steps_are_never_judged() -> None:
    watch = LossSpikes()
    assert not any(watch.see(step, loss, None) for step, loss in enumerate([1.0] * 10 + [100.0]))


REFERENCES = [f"text {number}" for number in range(100)]


@pytest.mark.parametrize("distinct", [1, 5])
def test_the_same_output_for_every_clip_is_told(distinct: int) -> None:
    said = [f"hello {number % distinct}" for number in range(100)]
    warning = collapse_warning(3, said, REFERENCES, "bleu4", 1.0, 0.5)
    assert warning is not None and f"{distinct} different sentences to 100 clips" in warning
    assert "--overfit" in warning and "\n" not in warning


def test_a_score_that_is_the_constant_sentences_is_told() -> None:
    said = [f"hello {number}" for number in range(100)]
    assert "exactly that of one sentence" in (collapse_warning(3, said, REFERENCES, "cer", 0.8, 0.8) or "")


@pytest.mark.parametrize(
    ("said", "references"),
    [
        ([f"hello {number % 20}" for number in range(100)], REFERENCES),
        (["yes"] * 100, ["yes"] * 100),  # all texts are alike, and so may be the outputs
    ],
)
def test_outputs_that_differ_as_texts_do_are_well(said: list[str], references: list[str]) -> None:
    assert collapse_warning(1, said, references, "bleu4", 1.0, 0.5) is None
