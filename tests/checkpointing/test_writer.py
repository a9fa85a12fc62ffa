"""A checkpoint is complete or absent: whatever fails while it is written, the previous one stays."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from tests.process_groups import group_of_one
from toolkit.checkpointing import writer as checkpoint_writer
from toolkit.checkpointing.checkpoints import LATEST, Progress, SavedState, complete_checkpoints, name_of, read_state
from toolkit.checkpointing.reader import load_checkpoint
from toolkit.checkpointing.writer import CheckpointWriter
from toolkit.errors import UserError

LAYOUT = {"world_size": 1, "zero_stage": 0, "precision": "fp32"}
IDENTITY = SavedState(Progress(), LAYOUT, "", {}, {}, "", {})


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(100, 1000)
        self.norm = nn.BatchNorm1d(1000)
        self.frozen = nn.Linear(1000, 10)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.norm(self.wide(x)))


def make_engine(seed: int = 0) -> Any:
    """A stand-in for DeepSpeed's engine at stage 0 in fp32."""
    torch.manual_seed(seed)
    module = Model()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    counters = dict.fromkeys(checkpoint_writer.COUNTERS, 0)
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, fp16_enabled=lambda: False, **counters
    )


def train(engine: Any, steps: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = engine.module(torch.randn(8, 100)).square().mean()
        loss.backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        engine.global_steps += 1
        losses.append(loss.item())
    return losses


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, said: list[str]) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(tmp_path / "checkpoints", IDENTITY, keep_last=2, echo=said.append)
    yield writer
    writer.close()


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def load(engine: Any, checkpoint: Path) -> list[str]:
    return load_checkpoint(engine, checkpoint, read_state(checkpoint), layout=LAYOUT, seed=0)


def test_training_resumes_to_the_last_bit(writer: CheckpointWriter) -> None:
    engine = make_engine()
    train(engine, 3)
    writer.save(engine, Progress(step=3))
    rest = train(engine, 3)  # the copy is of step 3, whenever it reaches the disk
    writer.wait()
    again = make_engine(seed=7)
    # Frozen weights are built, not loaded.
    again.module.frozen.load_state_dict(engine.module.frozen.state_dict())
    assert load(again, writer.folder / name_of(3)) == []
    assert again.global_steps == 3
    assert train(again, 3) == rest
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), engine.module.parameters(), strict=True))
    assert torch.equal(again.module.norm.running_mean, engine.module.norm.running_mean)


def test_many_files_and_little_memory(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "FILE_BYTES", 1000)
    monkeypatch.setattr(checkpoint_writer, "COPIED_BYTES", 1000)
    engine = make_engine()
    train(engine)
    writer.save(engine, Progress(step=1))
    writer.wait()
    assert len(list((writer.folder / name_of(1)).glob("rank_00_*"))) > 3
    again = make_engine(seed=7)
    load(again, writer.folder / name_of(1))
    assert torch.equal(again.module.wide.weight, engine.module.wide.weight)


def test_latest_follows_and_old_ones_go(writer: CheckpointWriter) -> None:
    engine = make_engine()
    for step in (1, 2, 3):
        train(engine)
        writer.save(engine, Progress(step=step))
    writer.wait()
    assert [path.name for path in complete_checkpoints(writer.folder)] == [name_of(2), name_of(3)]
    assert (writer.folder / LATEST).read_text().strip() == name_of(3)
    assert not list(writer.folder.glob(".*"))


def test_a_full_disk_leaves_the_last_one_intact(writer: CheckpointWriter, said: list[str]) -> None:
    engine = make_engine()
    train(engine)
    writer.save(engine, Progress(step=1))
    writer.wait()
    with small_disk(100_000):
        writer.save(engine, Progress(step=2))
        writer.save(engine, Progress(step=3))  # prints that step 2 failed, and tries again
        with pytest.raises(UserError, match=r"step 3 .*step_000001"):
            writer.wait()
    assert len(said) == 2 and "step 2 " in said[0] and "\n" not in said[0]
    assert [path.name for path in sorted(writer.folder.iterdir())] == [LATEST, name_of(1)]
    assert (writer.folder / LATEST).read_text().strip() == name_of(1)
    read_state(writer.folder / name_of(1))
    writer.save(engine, Progress(step=4))
    writer.wait()
    read_state(writer.folder / name_of(4))


def test_it_knows_which_models_a_run_that_resumes_would_look_for(writer: CheckpointWriter) -> None:
    engine = make_engine()
    train(engine)
    assert writer.models == set()
    writer.save(engine, Progress(step=1, kept=[(1, 5.0)]))
    writer.wait()
    writer.save(engine, Progress(step=2, kept=[(2, 6.0), (1, 5.0)]))
    assert writer.models == {1, 2}  # the new checkpoint may fail
    writer.wait()
    with small_disk(100_000):
        writer.save(engine, Progress(step=3, kept=[(3, 7.0)]))
        assert writer.models == {1, 2, 3}
        with pytest.raises(UserError):
            writer.wait()
    assert writer.models == {1, 2}
    writer.save(engine, Progress(step=4, kept=[(4, 8.0)]))
    writer.wait()
    assert writer.models == {4}


def test_an_unfinished_checkpoint_is_removed(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step_000005.partial").mkdir(parents=True)
    CheckpointWriter(folder, IDENTITY, keep_last=1, echo=said.append).close()
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    writer = CheckpointWriter(tmp_path / "checkpoints", IDENTITY, keep_last=1, echo=said.append)
    writer.save(make_engine(), Progress(step=1))
    with pytest.raises(UserError, match=r"step 1 .*none"):
        writer.wait()
    writer.close()


LISTED = {"lacks": r"it lacks frozen\.", "has": r"it has norm\.", "shape": r"another shape has wide\."}


@pytest.mark.parametrize("change", LISTED)
def test_a_checkpoint_of_another_model_is_refused(writer: CheckpointWriter, change: str) -> None:
    engine = make_engine()
    train(engine)
    writer.save(engine, Progress(step=1))
    writer.wait()
    other = make_engine()
    if change == "lacks":
        other.module.frozen.requires_grad_(True)
    elif change == "has":
        other.module.norm.requires_grad_(False)
    else:
        other.module.wide = nn.Linear(100, 7)
    before = [parameter.clone() for parameter in other.module.parameters()]
    with pytest.raises(UserError, match=LISTED[change]):
        load(other, writer.folder / name_of(1))
    assert all(torch.equal(a, b) for a, b in zip(before, other.module.parameters(), strict=True))


def test_another_optimizer_is_refused(writer: CheckpointWriter) -> None:
    engine = make_engine()
    train(engine)
    writer.save(engine, Progress(step=1))
    writer.wait()
    other = make_engine()
    other.optimizer = other.basic_optimizer = torch.optim.SGD(other.optimizer.param_groups[0]["params"], lr=0.1)
    with pytest.raises(UserError, match=r"AdamW.*SGD"):
        load(other, writer.folder / name_of(1))


def test_a_missing_file_is_reported(writer: CheckpointWriter, tmp_path: Path) -> None:
    engine = make_engine()
    train(engine)
    writer.save(engine, Progress(step=1))
    writer.wait()
    copy = tmp_path / "copy"
    shutil.copytree(writer.folder / name_of(1), copy)
    file = next(copy.glob("rank_*"))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        read_state(copy)


def test_nodes_without_a_shared_disk_are_reported(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(everyone: list[Any], mine: Any, group: Any) -> None:
        everyone[:] = [mine, ({"rank_01_00.safetensors": "0"}, None)]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", elsewhere)
    writer.save(make_engine(), Progress(step=1))
    with pytest.raises(UserError, match=r"rank_01_00.*run\.dir"):
        writer.wait()


def test_the_loss_scale_of_fp16_is_restored(writer: CheckpointWriter) -> None:
    def half(scale: float) -> Any:
        engine = make_engine()
        engine.fp16_enabled = lambda: True
        engine.optimizer.loss_scaler = SimpleNamespace(cur_scale=scale, cur_iter=7)
        return engine

    writer.save(half(1024.0), Progress(step=1))
    writer.wait()
    again = half(2.0)
    load(again, writer.folder / name_of(1))
    assert again.optimizer.loss_scaler.cur_scale == 1024.0
    load(make_engine(), writer.folder / name_of(1))  # another precision has no use for it


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_discards_a_checkpoint_that_a_failure_cut_off(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The last rank that ends may have written its files after rank 0 removed the folder."""
    waits, goes_on = threading.Event(), threading.Event()

    def for_ranks_that_are_dead(*_: Any) -> None:
        waits.set()
        goes_on.wait()

    monkeypatch.setattr(checkpoint_writer, "FINISH_SECONDS", 0)
    monkeypatch.setattr(writer, "_complete", for_ranks_that_are_dead)
    writer.save(make_engine(), Progress(step=3))
    waits.wait()
    assert len(list(writer.folder.iterdir())) == 1
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    writer.finish_or_discard()
    goes_on.set()
    assert list(writer.folder.iterdir()) == []
