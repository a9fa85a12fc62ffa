"""Which processes above a rank are DeepSpeed's launcher, and that their death is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.hidden_gpus import python_path
from tests.time_limits import limit
from toolkit.cluster.launchers import has_died

# A process that starts another one with the rest of its arguments and waits for it, as launchers do.
LINK = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
RANK = (
    "from toolkit.cluster.launchers import launcher_processes as f; print(*(p.pid for p in f()), flush=True); input()"
)


def launched(folder: Path, runner: str, launch: str) -> subprocess.Popen[str]:
    """A rank below two processes that go by these names."""
    package = folder / "deepspeed" / "launcher"
    package.mkdir(parents=True, exist_ok=True)
    for part in (package, package.parent):
        (part / "__init__.py").touch()
    for name in (runner, launch):
        (package / f"{name}.py").write_text(LINK)
    command = [*("-m", f"deepspeed.launcher.{runner}"), *("-m", f"deepspeed.launcher.{launch}"), "-c", RANK]
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": python_path(folder, Path(__file__).parents[2])},
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("runner", "launch", "watched"), [("runner", "launch", 2), ("shell", "launch", 1), ("runner", "other", 1)]
)
def test_only_deepspeeds_own_processes_are_watched(tmp_path: Path, runner: str, launch: str, watched: int) -> None:
    with launched(tmp_path, runner, launch) as top:
        assert top.stdout is not None and top.stdin is not None
        found = [psutil.Process(int(pid)) for pid in top.stdout.readline().split()]
        assert len(found) == watched
        rank = psutil.Process(top.pid).children(recursive=True)[-1]
        assert found == [rank.parent(), psutil.Process(top.pid)][:watched]
        assert not has_died(found)
        top.stdin.write("\n")
        top.stdin.flush()
        top.wait(timeout=limit(60))
    assert has_died(found)


@pytest.mark.process
def test_one_that_nobody_has_buried_yet_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        found = [psutil.Process(process.pid)]
        assert not has_died(found)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the list of processes
        assert has_died(found)
