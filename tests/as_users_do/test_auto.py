"""A shipped recipe with what the toolkit chooses itself, over epochs, stopped and resumed."""

from __future__ import annotations

import json

import pytest

from tests.as_users_do.conftest import User
from tests.as_users_do.life import live


@pytest.mark.nightly
def test_t5_small_with_micro_batches_that_are_chosen_on_two_ranks(at_first_contact: User) -> None:
    chosen = ("--ds", "auto", "training.micro_batch_size=auto", "run.dir=runs/chosen")
    life = live(at_first_contact, "t5_small", 2, *chosen, name="chosen")
    choice = json.loads((life.folder / "micro_batch.json").read_text())
    assert choice["clips"] >= 1 and choice["reason"]
    said = (life.folder / "log.txt").read_text()
    assert said.count("training.micro_batch_size=auto: micro-batches of") == 2, (
        "the choice is kept when the run resumes"
    )
