"""launch/train_slurm.sh, with stand-ins for srun and scontrol that write down how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train_slurm.sh"
SRUN = """#!/bin/sh
echo "srun $* at $MASTER_ADDR:$MASTER_PORT" >> "$CALLS"
exit $CODE
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$CALLS"
[ "$1 $2" = "show hostnames" ] && printf 'gpu-07\\ngpu-09\\n'
exit 0
"""


def submit(folder: Path, *arguments: str, code: int = 0, **changed: str | None) -> tuple[int, str, str]:
    """Run the script as a job; its exit code, what it says on stderr and the calls that it made."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    calls = folder / "calls.txt"
    calls.touch()
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        "CODE": str(code),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "gpu-[07,09]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    environment |= {key: value for key, value in changed.items() if value is not None}
    kept = {key: value for key, value in environment.items() if key not in changed or changed[key] is not None}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=kept, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stderr, calls.read_text()


def test_every_task_learns_where_the_first_node_is(tmp_path: Path) -> None:
    code, _, calls = submit(tmp_path, "t5_small", "--ds", "zero3", "training.epochs=2")
    assert code == 0
    port = 20000 + 1234567 % 20000
    assert f"{ROOT}/launch/train.py --recipe t5_small --ds zero3 training.epochs=2 at gpu-07:{port}" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(("code", "again"), [(75, True), (5, True), (4, False), (2, False), (1, False)])
def test_a_job_that_can_resume_by_itself_goes_back_into_the_queue_and_a_failed_one_does_not(
    tmp_path: Path, code: int, again: bool
) -> None:
    ended, _, calls = submit(tmp_path, "t5_small", code=code)
    assert ended == code
    assert ("scontrol requeue 1234567" in calls) == again


@pytest.mark.parametrize(
    ("arguments", "changed", "part"),
    [
        ([], {}, "usage: sbatch"),
        (["t5_small"], {"SLURM_JOB_ID": None}, "start it by sbatch launch/train_slurm.sh t5_small"),
        (["t5_small"], {"SLURM_SUBMIT_DIR": "/"}, "no launch/train.py in /: call sbatch in the clone"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    tmp_path: Path, arguments: list[str], changed: dict[str, str | None], part: str
) -> None:
    code, said, calls = submit(tmp_path, *arguments, **changed)
    assert code == 2
    assert part in said
    assert calls == ""


def test_the_ranks_are_asked_to_save_before_the_job_ends() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert any(line.startswith("#SBATCH --signal=USR1@") for line in lines)
