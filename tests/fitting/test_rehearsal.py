"""The process that rehearses: how it ends, and what its rank learns of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.fitting import rehearsal
from toolkit.fitting.rehearsal import Rehearsal
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.planning.sizes.shapes import Lengths, Shape, heaviest, lengths_of, limits_of
from toolkit.recipe.resolve import ResolvedRun


@pytest.fixture
def rehearsing(monkeypatch: pytest.MonkeyPatch, resolve: Callable[..., ResolvedRun]) -> Callable[..., Rehearsal]:
    """A rehearsal whose engine is built by a function."""

    def rehearsing(build: Callable[[], Any], *overrides: str) -> Rehearsal:
        monkeypatch.setattr(rehearsal.RehearsalEngine, "build", lambda *_: build())
        unused: Any = None
        return Rehearsal(resolve(*overrides), Ranks(), unused, Lengths(1, 9, 9, [], []), 1, has_gpu=False)

    return rehearsing


class Works:
    def start(self, _: Any) -> Measured:
        return Measured(seconds=1.0)


def fails(error: Exception) -> Callable[[], None]:
    def build() -> None:
        raise error

    return build


@pytest.mark.process
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
)
def test_too_little_memory_is_a_size_that_does_not_fit(rehearsing: Any, error: Exception) -> None:
    found = rehearsing(fails(error)).start()
    assert found.problem and not found.error


@pytest.mark.process
def test_another_error_is_none_of_memory(rehearsing: Any) -> None:
    kind, (trace,) = rehearsing(fails(KeyError("heads"))).start().error
    assert kind is RuntimeError and "KeyError: 'heads'" in trace
    of_cuda = (
        "CUDA error: no kernel image\nCUDA kernel errors might be reported later\nCompile with `TORCH_USE_CUDA_DSA`\n"
    )
    _, (trace,) = rehearsing(fails(RuntimeError(of_cuda))).start().error
    assert "no kernel image" in trace and "\n" not in trace
    assert rehearsing(fails(UserError("m", "h"))).start().error == (UserError, ("m", "h"))


@pytest.mark.process
def test_a_process_that_the_kernel_kills_is_a_size_that_does_not_fit(rehearsing: Any) -> None:
    found = rehearsing(lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    assert "-9" in found.problem


@pytest.mark.process
def test_the_process_ends_with_its_rank(rehearsing: Any) -> None:
    own = rehearsing(Works)
    assert own.start().seconds == 1.0
    own._connection.close()  # as the system does when the rank is killed
    own._process.join(60)
    assert own._process.exitcode == 0


@pytest.mark.nightly
def test_a_process_without_the_memory_of_its_rank_rehearses(
    resolve: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU, which does not survive a fork: all that the process needs is sent to it."""
    prefix = f"rehearsal-{os.getpid()}-"
    monkeypatch.setitem(multiprocessing.current_process()._config, "semprefix", f"/{prefix}")
    run = resolve("model.tiny=true", "training.micro_batch_size=auto", "training.global_batch_size=6")
    lengths = lengths_of(run, corpus.splits["train"])
    own = Rehearsal(run, Ranks(), corpus, lengths, 1, has_gpu=True)
    found = own.step(heaviest(limits_of(2, lengths), lengths), recomputes=False)
    left = list(Path("/dev/shm").glob(f"sem.{prefix}*"))
    own.close()
    assert (found.problem, found.error) == (None, None)
    assert found.seconds > 0 and found.resident > 2**20
    assert left == [], "Python would warn at the end of the run of each semaphore that a killed process has left"


@pytest.mark.process
def test_texts_are_generated_to_their_last_token(resolve: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; on CPUs their memory is computed."""
    run = resolve("model.tiny=true", "training.global_batch_size=6", "evaluation.max_new_tokens=5")
    lengths = lengths_of(run, corpus.splits["train"])
    computed = Rehearsal(run, Ranks(), corpus, lengths, 1, has_gpu=False)
    few, many = (computed.translation([Shape(clips, 20)]) for clips in (1, 1000))
    computed.close()
    assert many.resident - few.resident > 100 * 2**20
    # What the process itself has taken between the two questions is some pages.
    grown = many.address_space - few.address_space
    assert grown == pytest.approx(many.resident - few.resident, rel=0.01)

    def generate(engine: Any, shapes: list[Shape]) -> Measured:
        lengths: list[int] = []
        decode = engine.processor.batch_decode
        monkeypatch.setattr(
            engine.processor, "batch_decode", lambda found: lengths.append(found.shape[1]) or decode(found)
        )
        engine.generate(shapes[0])
        return Measured(seconds=float(lengths[0]))

    monkeypatch.setattr(rehearsal.RehearsalEngine, "translation", generate)
    own = Rehearsal(run, Ranks(), corpus, lengths, 1, has_gpu=False)
    found = own.translation([Shape(2, 20)])
    own.close()
    assert (found.problem, found.error) == (None, None)
    assert found.seconds in (5, 6), "with the token that a text begins with, or without it"


def test_what_it_swaps_lies_apart_and_is_removed(rehearsing: Any, resolve: Any, tmp_path: Path) -> None:
    nvme = f"ds.zero_optimization.offload_optimizer={{device: nvme, nvme_path: {tmp_path / 'disk'}}}"
    overrides = ("ds.zero_optimization.stage=3", nvme)
    own = rehearsing(Works, *overrides)
    mine = resolve(*overrides).deepspeed["zero_optimization"]["offload_optimizer"]["nvme_path"]
    swapped = Path(own._arguments[0].deepspeed["zero_optimization"]["offload_optimizer"]["nvme_path"])
    assert str(swapped) != mine and str(swapped).startswith(mine)
    swapped.mkdir(parents=True)
    own.close()
    assert not swapped.exists()
