"""`deepspeed --hostfile`: two nodes, one rank each, train as two ranks of one machine do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.two_nodes import NODES, TwoNodes, why_not
from tests.time_limits import limit

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0
REASON = why_not()


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    """Four steps of the demo recipe, tiny."""
    few = ["training.max_steps=4", "training.eval_every=99", "training.log_every=1", "evaluation.ctc_weight=0"]
    return ["--recipe", "demo", *settings, "training.epochs=9", *few]


@pytest.fixture(scope="module")
def one_machine(
    fork: Callable[..., Any], arguments: list[str], losses: Callable[[Path], list[float]], tmp_path_factory: Any
) -> list[float]:
    run_dir = tmp_path_factory.mktemp("one_machine") / "run"
    done = fork("launch/train.py", *arguments, f"run.dir={run_dir}", ranks=2)
    assert done.code == 0, done.out + done.err
    return losses(run_dir)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_two_nodes_have_the_losses_of_two_ranks_on_one(
    one_machine: list[float],
    arguments: list[str],
    losses: Callable[[Path], list[float]],
    command: Callable[..., list[str]],
    surroundings: dict[str, str],
    tmp_path: Path,
) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    # Neither comments nor blank lines: DeepSpeed's launcher takes every line for KEY=VALUE.
    (home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    (tmp_path / "hosts").write_text("".join(f"{node} slots=1\n" for node in NODES))
    deepspeed = command("launch/train.py", ranks=1)[0]
    with TwoNodes(tmp_path / "nodes") as nodes:
        done = subprocess.run(
            nodes.on(
                *("node-a", deepspeed, "--hostfile", str(tmp_path / "hosts"), "launch/train.py"),
                *(*arguments, f"run.dir={run_dir}"),
            ),
            cwd=ROOT,
            env=surroundings | {"HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=limit(PATIENCE),
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run_dir) == pytest.approx(one_machine, rel=1e-6)
    assert len(one_machine) == 4
    # Both nodes took part, each as the only rank of its machine.
    assert json.loads((run_dir / "scores.json").read_text())["world_size"] == 2
    for node in NODES:
        assert f"{node}: " in done.stdout + done.stderr, "pdsh names the node before each line"
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"
