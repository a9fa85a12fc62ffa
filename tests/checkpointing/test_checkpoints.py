"""Which checkpoint a run resumes from, and how a damaged one is reported."""

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
    archive_newer,
    choose_checkpoint,
    complete_checkpoints,
    name_of,
    read_state,
    remove_checkpoint,
    remove_unfinished,
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


def test_the_newest_complete_checkpoint_is_chosen(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path, "auto") is None
    for step in (999_999, 1_000_000, 5):
        write(tmp_path, step)
    (tmp_path / ".step_2000000.partial").mkdir()
    (tmp_path / "step_3000000").mkdir()
    assert choose_checkpoint(tmp_path, "auto") == tmp_path / "step_1000000"
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000005", "step_999999", "step_1000000"]
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_may_be_named(tmp_path: Path) -> None:
    named = write(tmp_path, 5)
    write(tmp_path, 10)
    assert choose_checkpoint(tmp_path, str(named)) == named
    for wrong in (tmp_path, tmp_path / "step_000007", tmp_path / "nowhere" / "step_000005"):
        with pytest.raises(UserError) as refusal:
            choose_checkpoint(tmp_path, str(wrong))
        assert f"--resume {wrong}" in refusal.value.message
        assert "step_000005" in refusal.value.hint and "step_000010" in refusal.value.hint
    write(tmp_path / "run" / "checkpoints", 3)
    with pytest.raises(UserError) as refusal:  # the run that holds it, as a user names it
        choose_checkpoint(tmp_path / "other" / "checkpoints", str(tmp_path / "run"))
    assert str(tmp_path / "run" / "checkpoints" / "step_000003") in refusal.value.hint
    with pytest.raises(UserError) as refusal:
        choose_checkpoint(tmp_path / "empty", str(tmp_path / "empty" / "x"))
    assert "--resume" in refusal.value.hint


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    state = read_state(write(tmp_path, 5))
    assert state.progress == Progress(step=5, kept=[(3, 1.5)])
    assert state.layout["zero_stage"] == 2


@pytest.mark.parametrize("name", [STATE, MANIFEST, "rank_00_00.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_found_and_the_checkpoint_before_it_is_named(tmp_path: Path, name: str, how: str) -> None:
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
    assert str(checkpoint) in refusal.value.message
    assert f"--resume {before}" in refusal.value.hint and "--new" in refusal.value.hint


def test_a_checkpoint_of_an_older_format_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 5)
    (checkpoint / STATE).write_text(json.dumps({"progress": {"step": 5}, "layout": {}}))
    with pytest.raises(UserError, match="format None"):
        read_state(checkpoint, verify=False)


def test_newer_checkpoints_are_archived_and_never_lost(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    (tmp_path / LATEST).write_text("step_000015\n")
    assert [path.name for path in archive_newer(tmp_path, 5)] == ["step_000010.aside_1", "step_000015.aside_1"]
    assert (tmp_path / LATEST).read_text() == "step_000005\n"
    write(tmp_path, 10)
    assert [path.name for path in archive_newer(tmp_path, 5)] == ["step_000010.aside_2"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000005"]
    assert choose_checkpoint(tmp_path, str(tmp_path / "step_000010.aside_2")) == tmp_path / "step_000010.aside_2"
    archive_newer(tmp_path, 4)
    assert not (tmp_path / LATEST).exists() and not complete_checkpoints(tmp_path)


def test_no_incomplete_checkpoint_has_its_name_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path, 5)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # the run dies before the first file is gone
    remove_checkpoint(checkpoint)
    assert not complete_checkpoints(tmp_path)
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
