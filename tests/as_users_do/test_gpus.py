"""Recipes as they are shipped on two GPUs: stopped, resumed, scored on both, translated and exported on one.

The model is small and random, as in ``test_recipes.py``. On pretended GPUs this takes minutes of two cores.
"""

from __future__ import annotations

import re

import pytest

from tests.as_users_do.conftest import User
from tests.as_users_do.life import live, use

RANKS = 2
# bf16, adapters and recomputed layers; the same in four bits.
RECIPES = ("t5_3b_lora", "t5_3b_qlora")
FOREIGN = re.compile(r"py\.warnings|Warning:|resource_tracker|leaked")  # what a library says for itself


@pytest.mark.gpu2
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_on_two_gpus(at_first_contact: User, name: str) -> None:
    user = at_first_contact
    life = live(user, name, ranks=RANKS)
    said = (life.folder / "log.txt").read_text() + life.folder.with_name(f"{life.name}.txt").read_text()
    assert "GiB of a GPU" in said, "micro-batches were rehearsed there"
    assert not [line for line in said.splitlines() if FOREIGN.search(line)]
    use(user, life, ranks=RANKS)
