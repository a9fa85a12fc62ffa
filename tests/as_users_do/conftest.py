"""What a user has: a clone, a hub that serves published models, clips of their own, and commands in a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.as_users_do.hub import Hub, serving
from tests.as_users_do.published import clone_repository, publish
from tests.end_to_end.conftest import Finished, launcher
from tests.hidden_gpus import python_path
from tests.time_limits import limit
from toolkit.corpus.demo import DemoSizes, make_demo

TIMEOUT = 900.0
# What a surrounding run or test sets and a user's shell does not.
NOT_A_USERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MALLOC_", "OMP_", "HF_", "PYTHONPATH", "TOKENIZERS_", "PYTEST_")


@dataclass(frozen=True)
class User:
    """Somebody with a clone.

    Attributes:
        clone: the folder in which commands are typed; runs and corpora come to lie there.
        environment: of their shell.
        data: overrides that name their clips.
        hub: where models come from.
    """

    clone: Path
    environment: dict[str, str]
    data: list[str]
    hub: Hub

    def words(self, script: str, *arguments: object, ranks: int = 0) -> list[str]:
        """The command line of a script under so many ranks; 0 starts it without a launcher."""
        return [*launcher(ranks), script, *map(str, arguments)]

    def run(self, script: str, *arguments: object, ranks: int = 0, **environment: str) -> Finished:
        """Type a command and wait for its end."""
        done = subprocess.run(
            self.words(script, *arguments, ranks=ranks),
            cwd=self.clone,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=limit(TIMEOUT),
            stdin=subprocess.DEVNULL,
        )
        return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The hub's folder of published models, and a clone whose cards describe them."""
    hub, clone = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("clone")
    publish(hub, clone_repository(clone))
    return hub, clone


@pytest.fixture(scope="session")
def many_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``table.csv`` and ``poses/``: enough for two steps of most recipes an epoch."""
    sizes = DemoSizes(train=136, dev=8, test=8, test_unseen_languages=4)
    return make_demo(tmp_path_factory.mktemp("clips") / "made", sizes, seed=1, workers=2)


@pytest.fixture
def hub(shelves: tuple[Path, Path]) -> Iterator[Hub]:
    """The hub, without faults."""
    with serving(shelves[0]) as hub:
        yield hub


@pytest.fixture(scope="module")
def at_first_contact(
    shelves: tuple[Path, Path], many_clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[User]:
    """A user who has never downloaded anything, and keeps what they download, and their runs, from test to test."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(NOT_A_USERS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    data = ["data.source=table", f"data.table={many_clips / 'table.csv'}", f"data.poses={many_clips / 'poses'}"]
    with serving(shelves[0]) as hub:
        own = {"PATH": path, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path_factory.mktemp("hf_home"))}
        own["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
        yield User(shelves[1], kept | own | {"PYTHONPATH": python_path()}, data, hub)
