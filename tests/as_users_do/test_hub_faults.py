"""What the terminal shows where the hub does not give a model: one line from all ranks together, and exit code 2."""

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
    at_first_contact.hub.cut.clear()


def told(done: Finished) -> str:
    assert done.code == EXIT_USER_ERROR, done.out + done.err
    assert "Traceback" not in done.out + done.err
    (line,) = done.errors
    return line


def test_a_gated_model_on_two_ranks(user: User) -> None:
    user.hub.gated.add("google-t5/t5-base")
    done = user.run("launch/train.py", "--recipe", "t5_base", *user.data, ranks=2)
    assert f"google-t5/t5-base is gated: ask for access at {user.hub.address}/google-t5/t5-base" in told(done)
    assert not (user.clone / "runs" / "t5_base").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("ds", ["zero1", "zero3"])
def test_weights_that_never_come_on_two_ranks(user: User, ds: str) -> None:
    """Under ZeRO-3 the first rank alone reads them, while the other waits for its pieces."""
    user.hub.cut["model.safetensors"] = 0
    done = user.run("launch/train.py", "--recipe", "t5_large", "--ds", ds, *user.data, ranks=2)
    assert "google-t5/t5-large was not downloaded whole from the hub" in told(done)
    user.hub.cut.clear()
    shrunk = ["training.max_steps=1", "training.epochs=1"]
    done = user.run("launch/train.py", "--recipe", "t5_large", "--ds", ds, *user.data, *shrunk, ranks=2)
    assert done.code == 0, done.out + done.err


@pytest.mark.nightly
def test_offline_with_an_empty_cache_and_with_a_full_one(user: User) -> None:
    arguments = ["--recipe", "flan_t5_base", *user.data, "training.max_steps=1", "training.epochs=1"]
    done = user.run("launch/train.py", *arguments, HF_HUB_OFFLINE="1")
    assert "google/flan-t5-base is not in the cache" in told(done)
    assert user.run("launch/train.py", *arguments).code == 0
    user.hub.asked.clear()
    done = user.run("launch/train.py", "--new", *arguments, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.out + done.err
    assert user.hub.asked == []
