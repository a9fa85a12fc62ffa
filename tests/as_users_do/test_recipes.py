"""Recipes as they are shipped, by the commands of README, on the user's clips, over epochs, stopped and resumed.

Nothing is set for speed: workers, threads, precision, beams, evaluation and augmentation are the recipes'. What shrinks
is the model, which comes from a hub on loopback (``published.py`` says what that hides), the data, the epochs, and how
often a checkpoint is written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.as_users_do.conftest import User
from tests.as_users_do.life import live, use
from toolkit.recipe.load import recipe_names

ON_ONE_RANK = ("demo", "t5_small")
MAY_BE_SET = {
    "data.source",
    "data.table",
    "data.poses",
    "training.epochs",
    "training.save_every",
    "training.max_steps",
    "run.dir",
}
# What test_transfer.py and test_graphs.py are about, and what runs without a stop are given of those with one.
OF_OTHERS = {
    "data.features",
    "data.features_fps",
    "data.corpora",
    "data.epoch_clips",
    "model.vocabulary",
    "model.init_from",
    "training.compile",
    "run.dir",
    "training.micro_batch_size",
    "training.micro_batch_frames",
    "evaluation.batch_frames",
}


@pytest.fixture
def user(at_first_contact: User) -> User:
    return at_first_contact


def test_demo_on_two_ranks(user: User) -> None:
    life = live(user, "demo", ranks=2)
    choice = json.loads((life.folder / "micro_batch.json").read_text())
    assert choice["clips"] >= 1 and choice["batch_frames"] >= 1 and choice["reason"]
    said = (life.folder / "log.txt").read_text()
    assert said.count("micro_batch_size=auto: micro-batches of") == 2, "a run that resumes keeps its choice"
    assert (life.folder / "best" / "model.safetensors").is_file() and (life.folder / "report.html").is_file()
    use(user, life)


def test_a_recipe_of_the_user_overfits_eight_clips(user: User) -> None:
    """README, "Your own data"; forty of its four hundred steps, each an epoch with its own loader processes."""
    assert user.run("launch/recipes.py", "cp", "t5_small", "my_recipe").code == 0
    recipe = user.clone / "recipes" / "my_recipe.yaml"
    table, poses = (word.partition("=")[2] for word in user.data[-2:])
    recipe.write_text(f"{recipe.read_text()}\ndata:\n  table: {table}\n  poses: {poses}\n")
    try:
        checked = user.run("launch/recipes.py", "check", "my_recipe")
        assert checked.code == 0, checked.out + checked.err
        steps = ("training.max_steps=40", "--json")
        learned = user.run("launch/train.py", "--recipe", "my_recipe", "--overfit", "8", *steps, ranks=1)
    finally:
        recipe.unlink()
    assert learned.code == 0, learned.out + learned.err
    assert learned.json["steps"] == 40
    assert learned.json["loss"] < 6  # about 8 nats per token at first


def test_nothing_is_set_for_speed() -> None:
    def settings(*names: str) -> set[str]:
        sources = [Path(__file__).with_name(name).read_text() for name in names]
        return set(re.findall(r'"([a-z_]+\.[a-z_.]+)=', "".join(sources)))

    assert settings("conftest.py", "life.py", "test_recipes.py") == MAY_BE_SET
    assert settings("test_transfer.py", "test_graphs.py", "whole_runs.py") == OF_OTHERS


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "demo"])
def test_every_other_recipe_on_two_ranks(user: User, name: str) -> None:
    use(user, live(user, name, ranks=2), ranks=2)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_rank_trains_as_two_do(user: User, name: str) -> None:
    use(user, live(user, name, ranks=1))
