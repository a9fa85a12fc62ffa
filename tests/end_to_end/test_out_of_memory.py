"""A run whose chosen micro-batches take too much memory: each start takes smaller ones, until it is finished, or the
step is taken again in halves where no other rank notices.

One of two ranks runs out of memory; in the next start the kernel kills it for want of memory, in a cgroup of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.faults import ALLOCATOR, MEMORY_CGROUPS, VARIABLE
from tests.end_to_end.warm_runs import Run, Warm, status_of, wait_for_the_end
from tests.rank_workers import prepared
from toolkit.checkpointing.checkpoints import complete_checkpoints, read_state
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import EXIT_SMALLER_NEXT
from toolkit.fitting.hardware import describe
from toolkit.fitting.kept_choices import settings_hash
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.choices import keep_choice
from toolkit.recipe.resolve import read_choice, resolve_named

RANKS = 2
STEPS = ("training.max_steps=5", "training.save_every=2", "training.eval_every=99", "training.log_every=1")
# Losses then depend on the micro-batches by the order of sums alone.
WITHOUT_DROPOUT = ("model.dropout=0", "model.pose_encoder.dropout=0")


@pytest.fixture(scope="module")
def warm(
    tmp_path_factory: pytest.TempPathFactory, surroundings: dict[str, str], command: Callable[..., list[str]]
) -> Iterator[Warm]:
    launcher = Warm(tmp_path_factory.mktemp("warm"), surroundings | {"TORCH_CPP_LOG_LEVEL": "ERROR"}, command)
    yield launcher
    launcher.process.communicate()


@pytest.fixture
def cgroups() -> Iterator[None]:
    """Skips where a process cannot have a memory cgroup of its own; removes those that were made."""
    if not os.access(MEMORY_CGROUPS, os.W_OK) or not (MEMORY_CGROUPS / "cgroup.procs").exists():
        pytest.skip("needs the right to make memory cgroups, of version 1")
    yield
    for folder in MEMORY_CGROUPS.glob("toolkit-test-*"):
        folder.rmdir()


@pytest.mark.usefixtures("cgroups")
def test_each_start_takes_smaller_micro_batches_and_the_losses_stay_equal(
    warm: Warm, settings: list[str], losses: Callable[[Path], list[float]], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shared = [value for value in prepared(settings) if "micro_batch_size" not in value]
    shared += [*STEPS, *WITHOUT_DROPOUT, "ds.data_types=null"]
    auto = [*shared, "training.micro_batch_size=auto"]
    keep_choice(largest(auto, "zero2"))

    def start(folder: str, overrides: list[str], fault: str, ds: str = "zero2") -> Run:
        words = ["--recipe", "t5_small", "--ds", ds, *overrides]
        variables = {VARIABLE: fault, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return warm.start(tmp_path / folder, words, ranks=RANKS, **variables)

    def failed(fault: str) -> tuple[int, list[str]]:
        """Code and errors of a start that meets a fault; what it leaves must be whole."""
        run = start("auto", auto, fault)
        processes = run.processes()
        code = run.wait()
        wait_for_the_end(processes)
        said = run.said()
        assert "Traceback" not in said, said
        assert status_of(run.folder)["status"] == "failed" and status_of(run.folder)["rank"] == 1
        for path in complete_checkpoints(run.folder / "checkpoints"):
            read_state(path)
        marked = read_choice(run.folder)
        assert marked and marked.too_large, said
        return code, [line for line in said.splitlines() if line.startswith(("error:", "hint:"))]

    code, (error, hint, *_) = failed("main_memory 1")
    assert code == EXIT_SMALLER_NEXT
    assert "rank 1" in error and "step 4" in error and ALLOCATOR.split(": ")[-2] in error, error
    assert "step_" in hint and "smaller micro-batches" in hint
    _, (error, *_) = failed("kernel 1")
    assert "rank 1" in error and "killed by the kernel" in error and "step 3" in error, error
    last = start("auto", auto, "none 0")
    assert last.wait() == 0, last.said()
    choice = read_choice(last.folder)
    assert choice and choice.is_smallest and choice.too_large is None
    plain = start("plain", [*shared, "training.micro_batch_size=4"], "none 0")
    assert plain.wait() == 0, plain.said()
    assert losses(last.folder) == pytest.approx(losses(plain.folder), rel=1e-3)
    assert len(losses(plain.folder)) == 5
    # At stage 1 no other rank notices that a forward pass failed: it is taken again in halves.
    keep_choice(largest(auto, "zero1"))
    halved = start("halved", auto, "main_memory 1", "zero1")
    assert halved.wait() == 0, halved.said()
    warnings = [line for line in halved.said().splitlines() if "two halves" in line]
    assert len(warnings) == 1 and "rank 1" in warnings[0] and "step 4" in warnings[0], halved.said()
    marked = read_choice(halved.folder)
    assert marked and marked.too_large and "step 4" in marked.too_large, "the next start takes smaller ones"
    assert losses(halved.folder) == pytest.approx(losses(plain.folder), rel=1e-3)


@pytest.mark.nightly
@pytest.mark.usefixtures("cgroups")
def test_where_the_kernel_has_killed_the_only_rank_the_next_start_takes_smaller_micro_batches(
    warm: Warm, settings: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = [value for value in prepared(settings) if "micro_batch_size" not in value]
    auto = [*own, *STEPS, "training.micro_batch_size=auto"]
    first = keep_choice(largest(auto, "zero2", ranks=1))

    def start(fault: str) -> Run:
        variables = {VARIABLE: fault, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return warm.start(tmp_path / "run", ["--recipe", "t5_small", "--ds", "zero2", *auto], ranks=1, **variables)

    killed = start("kernel 0")
    assert killed.wait() != 0
    assert status_of(killed.folder)["status"] == "running", "nobody was left to say otherwise"
    again = start("none 0")
    assert again.wait() == 0, again.said()
    assert "the kernel has killed" in again.said()
    choice = read_choice(again.folder)
    assert choice and choice.clips < first.clips and choice.too_large is None


def largest(overrides: list[str], ds: str, ranks: int = RANKS) -> MicroBatchChoice:
    """All clips of a rank in one micro-batch, as if a rehearsal had chosen them here."""
    resolved = resolve_named("t5_small", overrides, ranks, has_gpu=False, ds=ds)
    hardware = describe(Ranks(0, 0, ranks, ranks), [])
    settings = settings_hash(resolved, Corpus.open(resolved.recipe.data.corpus or ""))
    return MicroBatchChoice(resolved.recipe.training.global_batch_size // ranks, None, "chosen", hardware, settings)
