"""Real runs: the launchers, two ranks on the CPU, and a folder of clips made from real motion."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.warm_runs import Warm
from tests.hidden_gpus import SHOWN, python_path
from tests.scripts import load_script
from tests.time_limits import limit
from toolkit.checkpointing import run_lock
from toolkit.cluster.ranks import read_ranks
from toolkit.corpus.demo import DemoSizes, make_demo
from toolkit.errors import exit_code_of

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800.0  # seconds, on an idle machine; one that is slow in bf16 needs many minutes
# All that the tests here set so that a run takes seconds, and what of a user's run each hides. Recipes as they are
# shipped run in tests/as_users_do, which sets none of it; a fault that only shows there belongs there.
FOR_SPEED = {
    "model.from_scratch=true": "published weights: what the hub says, and how files become a backbone",
    "model.tiny=true": "parameters above ZeRO-3's thresholds and DeepSpeed's buckets, and the memory of it all",
    "model.pose_encoder.hidden=64": "products of the pose encoder's own width, most of a tiny model's time",
    "training.global_batch_size=8": "steps of many micro-batches; the last step of an epoch, which fillers fill up",
    "training.micro_batch_size=2": "as above",
    "data.workers=1": "preparation in processes of its own",
    "training.workers=0": "loader processes: their forks beside threads, their signals, their end after each epoch",
    "evaluation.num_beams=2": "beams that swap places often, and the memory of five",
    "evaluation.max_new_tokens=8": "outputs that end by themselves",
    "training.max_target_tokens=8": "whole texts as targets",
    "ds.bf16.enabled=false": "bf16: its rounding, its kernels, DeepSpeed's fp32 copies of what trains",
}
# The same of the environment.
SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",  # hides that a hub is asked for each file, also for those that it does not have
    "OMP_NUM_THREADS": "1",  # hides ranks whose threads take each other's cores, and sums in another order
}
# The fixture `fork` hides how long commands take to start, and an import that is missing: the process that it forks has
# imported all that a run imports. tests/as_users_do starts every command by Python, and so does the fixture `run`.
# Single tests set more: evaluations only at the end (`training.eval_every=99` hides their turns with training), few
# steps (`training.max_steps` hides whole epochs), one beam, DeepSpeed's `data_types`, and dropout or augmentation off
# where losses are compared. `test_cells.py` shrinks the rest (its ONE_BATCH and WHOLE_RUN).


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout that begins with a brace."""
        return json.loads([line for line in self.out.splitlines() if line.startswith("{")][-1])

    @property
    def errors(self) -> list[str]:
        """The errors on the terminal, each with its hint."""
        return re.findall(r"^error:.*(?:\nhint:.*)?", self.err, re.MULTILINE)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``table.csv`` and ``poses/``: 24 clips to train, a few to test."""
    folder = tmp_path_factory.mktemp("clips") / "made"
    return make_demo(folder, DemoSizes(train=24, dev=4, test=6, test_unseen_languages=3), seed=1)


@pytest.fixture(scope="session")
def settings(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides by which any recipe trains on those clips in seconds, in fp32, from nothing."""
    return [
        f"data.table={clips / 'table.csv'}",
        f"data.poses={clips / 'poses'}",
        "data.source=table",
        f"data.cache={tmp_path_factory.mktemp('corpora')}",
        *FOR_SPEED,
    ]


def environment() -> dict[str, str]:
    """Nothing of a surrounding run may reach the one under test; the environment's own tools are found."""
    of_runs = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MALLOC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(of_runs)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return kept | {"PATH": path, "PYTHONPATH": python_path(ROOT), **SURROUNDINGS}


def launcher(ranks: int) -> list[str]:
    """The command that starts ``ranks`` processes of a script; each has a port of its own, so tests may run abreast."""
    if ranks == 0:
        return [sys.executable]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(port)]


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The command line of a script under so many ranks; 0 starts it without a launcher."""
    return lambda script, *arguments, ranks=0: [*launcher(ranks), str(ROOT / script), *map(str, arguments)]


@pytest.fixture(scope="session")
def run(command: Callable[..., list[str]]) -> Callable[..., Finished]:
    """Run a script to its end, in processes that Python starts."""

    def run(script: str, *arguments: object, ranks: int = 0, cwd: Path | None = None) -> Finished:
        done = subprocess.run(
            command(script, *arguments, ranks=ranks),
            cwd=cwd or ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=limit(TIMEOUT),
            stdin=subprocess.DEVNULL,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., list[str]]) -> Iterator[Warm]:
    """A process that has imported everything, and whose forks are the commands of tests."""
    launcher = Warm(tmp_path_factory.mktemp("warm"), environment(), command)
    yield launcher
    launcher.process.communicate()


@pytest.fixture(scope="session")
def fork(request: pytest.FixtureRequest, command: Callable[..., list[str]]) -> Callable[..., Finished]:
    """Run a script to its end as ``run`` does, for the price of a fork: what it imports is there already.

    Where GPUs are shown it is ``run``: bitsandbytes asks them as it is imported, and no fork may use them afterwards.
    """
    if SHOWN:
        started: Callable[..., Finished] = request.getfixturevalue("run")
        return started
    warm: Warm = request.getfixturevalue("warm")

    def fork(script: str, *arguments: object, ranks: int = 0, cwd: Path | None = None) -> Finished:
        words = command(script, *arguments, ranks=ranks)
        return Finished(*warm.run(words, environment(), cwd or ROOT, TIMEOUT))

    return fork


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run the trainer in this process, which costs no start, to a refusal before there is a process group."""
    command = load_script("launch/train.py")
    monkeypatch.setattr("toolkit.training.engine.set_allocator", lambda _: None)  # its settings would outlive the test

    def train(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        code = exit_code_of(lambda: command.run(command.parse(), read_ranks()), debug=False)
        run_lock.release()  # a command's process ends here
        printed = capsys.readouterr()
        return Finished(code, printed.out, printed.err)

    return train


@pytest.fixture(scope="session")
def surroundings() -> dict[str, str]:
    """The environment of a run, for tests that start one in their own way."""
    return environment()


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """The loss of every step in a run's metrics."""

    def losses(run_dir: Path) -> list[float]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    return losses
