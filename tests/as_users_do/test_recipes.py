"""Recipes as they are shipped, typed as README has it, on clips of one's own.

Nothing is set for speed: workers, threads, precision, beams, evaluation and augmentation are the recipes'. What shrinks
is the model's weights, which come from a hub on loopback, the data, the epochs and how often a checkpoint is written.
"""

from __future__ import annotations

from tests.as_users_do.conftest import User


def test_t5_small_trains_over_epochs(at_first_contact: User) -> None:
    user = at_first_contact
    run = user.run("launch/train.py", "--recipe", "t5_small", *user.data, "training.epochs=3", ranks=2)
    assert run.code == 0, run.out + run.err
