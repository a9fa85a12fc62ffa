"""Failures for want of memory: what the terminal says of them, their exit codes, and what the next start takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tests.small_runs import corpus, resolve
from toolkit.checkpointing.checkpoints import Progress
from toolkit.checkpointing.run_directory import start, write_status
from toolkit.cluster.failures import Failure
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, EXIT_SMALLER_NEXT
from toolkit.planning.comparison import Advice
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.choices import folder_of
from toolkit.recipe.resolve import ResolvedRun, read_choice
from toolkit.training import out_of_memory as module
from toolkit.training.monitoring.memory_phases import MemoryPhases, Shape
from toolkit.training.out_of_memory import RunFailures, advice_in_words, kernels_counts, mark_if_killed

__all__ = ["corpus", "resolve"]

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
OWN = Failure(1, "node", "x", "error: x", who="rank 1 (node, process 7)")
LOST = replace(OWN, has_died=True)
CHOICE = MicroBatchChoice(4, 120, "fastest", "a machine", "abc")
GIB = 2**30


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "oom_kills", lambda: 3)


@pytest.fixture
def make(resolve: Any, corpus: Corpus) -> Any:
    def make(run: ResolvedRun | None = None, *, kills: int = 3, **of_memory: Any) -> RunFailures:
        run = run or resolve("training.micro_batch_size=2")
        run.run_dir.mkdir(exist_ok=True)
        memory = MemoryPhases(**{"phase": "step", "batch": Shape(2, 30, 8), **of_memory})
        return RunFailures(run, Ranks(1, 1, 2, 2), corpus, memory, Progress(step=12), kills)

    return make


def test_a_step_that_ran_out_of_memory_is_named_with_its_micro_batch(make: Any) -> None:
    failure = make().explain(OWN, CUDA)
    error, hint = failure.lines.splitlines()
    assert all(part in error for part in (OWN.who, "step 13", "2 clips x 30 frames x 8 tokens", "2.00 GiB"))
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert failure.reason in error
    assert failure.code == EXIT_OUT_OF_MEMORY and failure.is_explained


@pytest.mark.parametrize("phase", ["start", "evaluation", "save"])
def test_other_phases_are_named(make: Any, phase: str) -> None:
    line = make(phase=phase).explain(OWN, MemoryError()).lines
    assert phase[:4] in line.replace("saved", "save") and "clips" not in line


def test_other_errors_stay_what_they_are(make: Any) -> None:
    failures = make()
    assert failures.explain(OWN, KeyError(7)) is OWN
    assert failures.explain(LOST, None) is LOST, "the kernel has killed nothing"
    assert failures.advise(OWN) == ""


def test_a_gpu_that_has_failed_is_named(make: Any) -> None:
    failures = make()
    failure = failures.explain(OWN, RuntimeError("CUDA error: uncorrectable ECC error encountered\nSearch for more"))
    error, hint = failure.lines.splitlines()
    assert all(part in error for part in ("error: ", OWN.who, "step 13", "ECC")) and "Search" not in error
    assert hint.startswith("hint: ") and "saved" in hint and "nvidia-smi" in hint
    assert failure.code == EXIT_FAILED and not failure.is_explained, "its traceback is shown"
    assert failures.advise(failure) == ""


def test_a_rank_that_the_kernel_killed_is_named(make: Any) -> None:
    failure = make(kills=2).explain(LOST, None)
    assert all(part in failure.lines for part in (LOST.who, "kernel", "step 13"))
    assert failure.code == EXIT_OUT_OF_MEMORY
    hangs = replace(OWN, has_died=False)
    assert make(kills=2).explain(hangs, None) is hangs


def test_a_loader_process_that_the_kernel_killed_is_named(make: Any) -> None:
    error = RuntimeError("DataLoader worker (pid 11) is killed by signal: Killed. ")
    assert "loader" in make(kills=2).explain(OWN, error).lines
    assert make().explain(OWN, error) is OWN


def test_the_checkpoint_that_the_run_resumes_from_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = make()
    assert "starts again" in failures.explain(OWN, CUDA).lines
    saved = failures.resolved.run_dir / "checkpoints" / "step_0000010"
    saved.mkdir(parents=True)
    monkeypatch.setattr(module, "complete_checkpoints", lambda folder: [saved] if folder == saved.parent else [])
    assert "step_0000010" in failures.explain(OWN, CUDA).lines


def test_chosen_micro_batches_are_marked_for_the_next_start(make: Any, resolve: Any) -> None:
    run = resolve("training.micro_batch_size=auto").with_choice(CHOICE)
    failure = make(run).explain(OWN, CUDA)
    assert failure.code == EXIT_SMALLER_NEXT
    assert "smaller micro-batches" in failure.lines
    for folder in (run.run_dir, folder_of("a machine", "abc")):
        marked = read_choice(folder)
        assert marked and marked.too_large and "step 13" in marked.too_large
        assert replace(marked, too_large=None) == CHOICE


@pytest.mark.parametrize("unlike", ["", "status", "count", "boot", "smallest"])
def test_after_a_run_without_an_end_the_next_start_takes_smaller_ones_if_the_kernel_has_killed(
    resolve: Any, corpus: Corpus, unlike: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = replace(CHOICE, is_smallest=unlike == "smallest")
    run = resolve("training.micro_batch_size=auto").with_choice(choice)
    monkeypatch.setattr(module, "oom_kills_by_place", lambda: {"cgroups": 5, "machine": 7})
    start(run, corpus, **kernels_counts())
    # A new container of the same machine.
    later = {"cgroups": 0, "machine": 7 if unlike == "count" else 8}
    monkeypatch.setattr(module, "oom_kills_by_place", lambda: later)
    if unlike == "boot":
        monkeypatch.setattr(module, "boot_id", lambda: "another")
    if unlike == "status":
        write_status(run.run_dir, "failed", reason="out of memory, and reported")
    mark_if_killed(run.run_dir)
    marked = read_choice(run.run_dir)
    assert marked and bool(marked.too_large) == (not unlike)


@pytest.mark.parametrize("why", ["smallest", "evaluation"])
def test_smaller_micro_batches_are_not_promised_where_they_do_not_help(make: Any, resolve: Any, why: str) -> None:
    choice = replace(CHOICE, is_smallest=why == "smallest")
    run = resolve("training.micro_batch_size=auto").with_choice(choice)
    failure = make(run, phase="step" if why == "smallest" else "evaluation").explain(OWN, CUDA)
    assert failure.code == EXIT_OUT_OF_MEMORY
    assert read_choice(run.run_dir) is None


def test_a_run_directory_that_cannot_be_written_promises_nothing(make: Any, resolve: Any) -> None:
    run = resolve("training.micro_batch_size=auto").with_choice(CHOICE)
    failures = make(run)
    run.run_dir.rmdir()
    run.run_dir.write_text("a file")
    assert failures.explain(OWN, CUDA).code == EXIT_OUT_OF_MEMORY


def test_settings_that_resume_stand_before_those_of_another_model() -> None:
    line = advice_in_words(
        [
            Advice("", "model.lora.r=16", 2.5 * GIB, True),
            Advice("", "training.gradient_checkpointing=true", 1.25 * GIB, True),
        ],
        has_gpu=True,
    )
    assert line.startswith("hint: ")
    assert line.index("gradient_checkpointing=true (1.25 GiB") < line.index("--new") < line.index("lora.r=16 (2.50 GiB")
    assert "GPU" in advice_in_words([Advice("", "--ds zero3", GIB, True)], has_gpu=False)
    assert advice_in_words([], has_gpu=True) == ""


def test_advice_is_that_of_the_plan_with_the_micro_batches_of_the_run(make: Any) -> None:
    failures = make(first=(Shape(64, 300, 60),))
    line = failures.advise(failures.explain(OWN, CUDA))
    assert line.startswith("hint: ") and line.endswith("\n")
    assert "training.gradient_checkpointing=true (" in line and "GiB less" in line
    assert failures.resolved.recipe.training.micro_batch_size == 2


def test_advice_before_the_first_micro_batch_is_for_the_largest_that_may_come(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice_within = MagicMock(return_value=[])
    monkeypatch.setattr(module, "advice_within", advice_within)
    failures = make(phase="start")
    assert failures.advise(failures.explain(OWN, CUDA)) == ""
    *_, computed, phase = advice_within.call_args.args
    assert phase == "start"
    assert computed.clips == 2 and computed.frames == failures.resolved.recipe.data.max_frames
