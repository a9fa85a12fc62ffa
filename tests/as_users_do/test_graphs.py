"""training.compile=graphs, otherwise as shipped: two ranks, epochs, evaluations, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.as_users_do.conftest import User
from tests.as_users_do.life import entries_of, live, use
from tests.as_users_do.whole_runs import run_without_a_stop

SCRIPT = str(Path(__file__).with_name("train_by_graphs.py"))
RANKS = 2


@pytest.fixture
def user(at_first_contact: User) -> User:
    return at_first_contact


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in entries_of(folder) if entry["kind"] == "train"]


@pytest.mark.nightly
def test_t5_small_by_graphs(user: User) -> None:
    data = [*user.data, "training.compile=graphs"]
    life = live(user, "t5_small", RANKS, data=data, name="graphs", script=SCRIPT)
    log = (life.folder / "log.txt").read_text()
    assert "without CUDA graphs" not in log
    assert log.count("stand-in: replay") > log.count("a CUDA graph: passes of") > 0
    _, _, after = log.partition("after epoch 1")
    assert "stand-in: replay" in after, "an evaluation ends no graph"
    use(user, life)
    found, whole = losses(life.folder), losses(run_without_a_stop(user, life, RANKS, script=SCRIPT))
    stop = life.stopped_at
    assert len(found) == len(whole) and found[:stop] == whole[:stop]
    # The first step of a start runs as it is written, which rounds bf16 in another order.
    assert found[stop:] == pytest.approx(whole[stop:], rel=1e-2)
