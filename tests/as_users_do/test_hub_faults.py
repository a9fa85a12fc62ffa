"""The hub refuses a model: the ranks together print one error, and end with exit code 2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.as_users_do.conftest import User
from tests.end_to_end.conftest import Finished
from toolkit.errors import EXIT_USER_ERROR


@pytest.fixture
def user(at_first_contact: User) -> Iterator[User]:
    yield at_first_contact
    at_first_contact.hub.gated.clear()
    at_first_contact.hub.truncated.clear()


def error_of(done: Finished) -> str:
    assert done.code == EXIT_USER_ERROR, done.out + done.err
    assert "Traceback" not in done.out + done.err
    (error,) = done.errors
    return error


def test_a_gated_model_on_two_ranks(user: User) -> None:
    """As those of Meta and Google are to users without a token."""
    user.hub.gated.add("meta-llama/Llama-3.1-8B")
    done = user.run("launch/train.py", "--recipe", "llama3_1_8b_qlora", *user.data, ranks=2)
    error = error_of(done)
    assert "meta-llama/Llama-3.1-8B is gated" in error and f"{user.hub.address}/meta-llama/Llama-3.1-8B" in error
    assert not (user.clone / "runs" / "llama3_1_8b_qlora").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(("recipe", "ds"), [("t5_large", "zero1"), ("bart_large", "zero3")])
def test_a_download_that_always_breaks_on_two_ranks(user: User, recipe: str, ds: str) -> None:
    """Under ZeRO-3 the first rank alone reads them, while the other waits for its partitions."""
    arguments = ["--recipe", recipe, "--ds", ds, *user.data, f"run.dir=runs/broken_{recipe}"]
    user.hub.truncated["model.safetensors"] = 0
    done = user.run("launch/train.py", *arguments, ranks=2)
    assert recipe.replace("_", "-") in error_of(done)
    user.hub.truncated.clear()
    shrunk = ["training.max_steps=1", "training.epochs=1"]  # a run that failed before its first step may change them
    done = user.run("launch/train.py", *arguments, *shrunk, ranks=2)
    assert done.code == 0, done.out + done.err


@pytest.mark.nightly
def test_offline_with_an_empty_cache_and_with_a_full_one(user: User) -> None:
    arguments = ["--recipe", "flan_t5_base", *user.data, "training.max_steps=1", "training.epochs=1"]
    arguments.append("run.dir=runs/offline")
    done = user.run("launch/train.py", *arguments, HF_HUB_OFFLINE="1")
    assert "google/flan-t5-base" in error_of(done)
    assert user.run("launch/train.py", *arguments).code == 0
    user.hub.asked.clear()
    done = user.run("launch/train.py", "--new", *arguments, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.out + done.err
    assert user.hub.asked == []
