"""A run cannot resume: an error and a hint, exit code 2, and nothing in the run directory has changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from toolkit.checkpointing import run_lock
from toolkit.checkpointing.checkpoints import complete_checkpoints, read_state

Run = Callable[..., Any]
BEFORE, NEWEST = "step_000001", "step_000002"


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    small = ["model.pose_encoder.hidden=32", "training.save_every=1", "training.epochs=9", "training.max_steps=20"]
    return ["--recipe", "t5_small", "--ds", "zero2", *settings, *small, "ds.data_types=null", "training.eval_every=99"]


@pytest.fixture(scope="module")
def stopped(fork: Run, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after its second step, with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    for _ in range(2):
        done = fork("launch/train.py", *arguments, "training.time_limit=0.0001", f"run.dir={run_dir}")
        assert done.code == 75, done.out + done.err
    assert [path.name for path in complete_checkpoints(run_dir / "checkpoints")] == [BEFORE, NEWEST]
    return run_dir


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def refused(arguments: list[str], train_here: Callable[..., Any]) -> Callable[..., str]:
    """Run the trainer in this process, expect a refusal and return its error and hint."""

    def refused(run_dir: Path, *more: object) -> str:
        before = contents(run_dir)
        done = train_here(*arguments, *more, f"run.dir={run_dir}")
        assert done.code == 2
        assert re.fullmatch(r"error: .+\nhint: .+\n", done.err), done.err
        assert contents(run_dir) == before
        return str(done.err)

    return refused


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {str(path): xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in files}


@pytest.mark.parametrize("how", ["flipped", "half"])
def test_a_damaged_checkpoint(refused: Callable[..., str], run_dir: Path, how: str) -> None:
    shard = run_dir / "checkpoints" / NEWEST / "rank_00_00.safetensors"
    if how == "half":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    printed = refused(run_dir)
    assert shard.name in printed and NEWEST in printed
    assert f"--resume {run_dir / 'checkpoints' / BEFORE}" in printed


def test_a_checkpoint_that_does_not_exist(refused: Callable[..., str], run_dir: Path) -> None:
    printed = refused(run_dir, "--resume", run_dir / "checkpoints" / "step_000009")
    assert BEFORE in printed and NEWEST in printed


def test_a_checkpoint_of_another_model(refused: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / NEWEST
    printed = refused(tmp_path / "new", "--resume", checkpoint, "model.pose_encoder.hidden=48")
    assert str(checkpoint) in printed and "model.pose_encoder.hidden 32 -> 48" in printed
    assert "model.pose_encoder.hidden 32 -> 48" in refused(run_dir, "model.pose_encoder.hidden=48")


def test_a_checkpoint_of_another_corpus(refused: Callable[..., str], clips: Path, run_dir: Path) -> None:
    table = clips / "table.csv"
    before = table.read_text()
    lines = before.splitlines(keepends=True)
    try:
        table.write_text("".join(lines[:5] + lines[6:]))
        assert "other clips" in refused(run_dir)
    finally:
        table.write_text(before)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.backbone=bart_large", "model.backbone t5_small -> bart_large"),
        ("evaluation.select_by=cer", "evaluation.select_by bleu4 -> cer"),
        ("data.fps=5", "data.fps 12.5 -> 5.0"),
        (None, "other clips"),
    ],
)
def test_a_finished_run_has_no_scores_for_other_settings(
    refused: Callable[..., str], clips: Path, run_dir: Path, setting: str | None, named: str
) -> None:
    (run_dir / "status.json").write_text('{"status": "finished"}')
    (run_dir / "scores.json").write_text("{}")
    table = clips / "table.csv"
    before = table.read_text()
    try:
        table.write_text(before if setting else "".join(before.splitlines(keepends=True)[:-3]))
        printed = refused(run_dir, *([setting] if setting else []))
    finally:
        table.write_text(before)
    assert named in printed and str(run_dir) in printed and "--new" in printed


def test_more_ranks_than_clips_of_a_step(
    refused: Callable[..., str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(key, value)
    assert "training.global_batch_size" in refused(run_dir, "training.global_batch_size=1")


def test_a_folder_that_cannot_be_written(refused: Callable[..., str]) -> None:
    assert "run.dir=" in refused(Path("/proc/nowhere/run"))


def test_a_run_resumes_from_an_older_checkpoint_and_keeps_the_newer_one(
    fork: Run, arguments: list[str], run_dir: Path
) -> None:
    named = run_dir / "checkpoints" / BEFORE
    few = ["training.time_limit=0.0001", f"run.dir={run_dir}"]
    again = fork("launch/train.py", *arguments, *few, "--resume", named)
    assert again.code == 75, again.out + again.err
    assert str(named) in again.out and f"{NEWEST}.aside_1" in again.out
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "interrupted"
    old, new = (read_state(run_dir / "checkpoints" / name) for name in (f"{NEWEST}.aside_1", NEWEST))
    assert (old.progress.epoch, old.progress.epoch_step) == (new.progress.epoch, new.progress.epoch_step)


def test_a_new_run_archives_the_old_one(fork: Run, arguments: list[str], run_dir: Path) -> None:
    before = contents(run_dir)
    new = fork("launch/train.py", *arguments, "training.time_limit=0.0001", f"run.dir={run_dir}", "--resume", "never")
    assert new.code == 75, new.out + new.err
    assert [path.name for path in complete_checkpoints(run_dir / "checkpoints")] == [BEFORE]
    archived = run_dir.with_name(f"{run_dir.name}.1")
    assert sorted(contents(archived).values()) == sorted(before.values())


@pytest.mark.parametrize(
    "wrong", ["data.poses={}/nowhere", "training.global_batch_size=0", "model.init_from={}/nowhere"]
)
def test_a_new_run_that_is_refused_leaves_the_old_one(
    refused: Callable[..., str], run_dir: Path, tmp_path: Path, wrong: str
) -> None:
    refused(run_dir, wrong.format(tmp_path), "--new")
    assert not run_dir.with_name(f"{run_dir.name}.1").exists()


def test_a_run_in_which_another_command_trains(
    refused: Callable[..., str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 0)
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    words = [sys.executable, "-c", lock, str(run_dir / run_lock.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        for how in ([], ["--new"], ["--extend", "training.max_steps=30"]):
            assert str(run_dir) in refused(run_dir, *how)
        other.communicate(b"\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint, and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a disk of a few megabytes")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(fork: Run, arguments: list[str], small_disk: Path) -> None:
    command = ["launch/train.py", *arguments, "training.max_steps=3", f"run.dir={small_disk / 'run'}"]
    full = fork(*command)
    assert full.code == 2, full.out + full.err
    assert len(full.errors) == 1 and "No space left on device" in full.errors[0], full.err
    assert "Traceback" not in full.err
    kept = complete_checkpoints(small_disk / "run" / "checkpoints")
    assert kept and str(kept[-1]) in full.errors[0]
    read_state(kept[-1])
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    again = fork(*command)
    assert again.code == 0, again.out + again.err
    assert str(kept[-1]) in again.out
