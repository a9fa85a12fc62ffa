"""Which checkpoint a run goes on from, and what it is told of a damaged one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from toolkit.checkpointing.checkpoints import (
    LATEST,
    MANIFEST,
    STATE,
    Progress,
    SavedState,
    choose_checkpoint,
    complete_checkpoints,
    name_of,
    read_state,
    remove_checkpoint,
    remove_unfinished,
    set_newer_aside,
)
from toolkit.checkpointing.tensor_files import checksum
from toolkit.errors import UserError


def write(folder: Path, step: int) -> Path:
    checkpoint = folder / name_of(step)
    checkpoint.mkdir(parents=True)
    layout = {"world_size": 1, "zero_stage": 2, "precision": "fp32"}
    state = SavedState(Progress(step=step, kept=[(3, 1.5)]), layout, "AdamW", {}, {}, "", {})
    (checkpoint / STATE).write_text(json.dumps(asdict(state)))
    (checkpoint / "rank_00_00.safetensors").write_bytes(bytes(range(100)))
    sums = {path.name: checksum(path) for path in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps(sums))
    return checkpoint


def test_the_newest_complete_one_is_chosen(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path, "auto") is None
    for step in (999_999, 1_000_000, 5):
        write(tmp_path, step)
    (tmp_path / ".step_2000000.partial").mkdir()
    (tmp_path / "step_3000000").mkdir()
    assert choose_checkpoint(tmp_path, "auto") == tmp_path / "step_1000000"
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000005", "step_999999", "step_1000000"]
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_one_may_be_named(tmp_path: Path) -> None:
    named = write(tmp_path, 5)
    write(tmp_path, 10)
    assert choose_checkpoint(tmp_path, str(named)) == named
    for wrong in (tmp_path, tmp_path / "step_000007", tmp_path / "nowhere" / "step_000005"):
        with pytest.raises(UserError, match=r"--resume .*no complete checkpoint.*step_000005.*step_000010"):
            choose_checkpoint(tmp_path, str(wrong))
    with pytest.raises(UserError, match="none nearby"):
        choose_checkpoint(tmp_path / "empty", str(tmp_path / "empty" / "x"))


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    state = read_state(write(tmp_path, 5))
    assert state.progress == Progress(step=5, kept=[(3, 1.5)])
    assert state.layout["zero_stage"] == 2


@pytest.mark.parametrize("name", [STATE, MANIFEST, "rank_00_00.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damage_is_found_and_the_one_before_is_named(tmp_path: Path, name: str, how: str) -> None:
    before, checkpoint = write(tmp_path, 5), write(tmp_path, 10)
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    with pytest.raises(UserError) as refusal:
        read_state(checkpoint)
    message = str(refusal.value)
    assert "\n" not in message
    assert str(checkpoint) in message and f"--resume {before}" in message and "--new" in message


def test_one_of_an_older_toolkit_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 5)
    (checkpoint / STATE).write_text(json.dumps({"progress": {"step": 5}, "layout": {}}))
    with pytest.raises(UserError, match="another version"):
        read_state(checkpoint, verify=False)


def test_newer_ones_are_set_aside_and_never_lost(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    (tmp_path / LATEST).write_text("step_000015\n")
    assert [path.name for path in set_newer_aside(tmp_path, 5)] == ["step_000010.aside_1", "step_000015.aside_1"]
    assert (tmp_path / LATEST).read_text() == "step_000005\n"
    write(tmp_path, 10)
    assert [path.name for path in set_newer_aside(tmp_path, 5)] == ["step_000010.aside_2"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000005"]
    assert choose_checkpoint(tmp_path, str(tmp_path / "step_000010.aside_2")) == tmp_path / "step_000010.aside_2"
    set_newer_aside(tmp_path, 4)
    assert not (tmp_path / LATEST).exists() and not complete_checkpoints(tmp_path)


def test_one_that_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write(tmp_path, 5)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # the run dies before the first file is gone
    remove_checkpoint(checkpoint)
    assert not complete_checkpoints(tmp_path)
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
