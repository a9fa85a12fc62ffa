"""Real captures of calls as CUDA graphs: what a failed one leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from toolkit.decoding.step_graphs import CudaGraphs

HALF = 2**28  # bytes


def asks(ones: torch.Tensor) -> torch.Tensor:
    """Waits for the GPU, which the call itself refuses."""
    dropped = functional.dropout(ones, 0.5)
    return dropped if dropped.sum().item() >= 0 else ones


def leaves_work(ones: torch.Tensor) -> torch.Tensor:
    """Does not wait for another stream, which the end of the capture refuses."""
    dropped, other = functional.dropout(ones, 0.5), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        dropped.mul_(2)
    return dropped


def takes_too_much(ones: torch.Tensor) -> torch.Tensor:
    """Runs out of memory, once it runs within a capture."""
    dropped = functional.dropout(ones, 0.5)
    if torch.cuda.is_current_stream_capturing():
        torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")
    return dropped


FAILING = {asks: "captur", leaves_work: "captur", takes_too_much: "out of memory"}


@pytest.mark.gpu
@pytest.mark.parametrize("call", FAILING)
def test_after_a_failed_capture_calls_work_as_before(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    capture, ones = CudaGraphs(), torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match=FAILING[call]):
        capture(lambda: call(ones))
    assert set(functional.dropout(ones, 0.5).tolist()) <= {0.0, 2.0}
    held = []
    for _ in range(3):  # memory that another stream used comes back
        memory = torch.empty(HALF, dtype=torch.uint8, device="cuda")
        memory.record_stream(torch.cuda.Stream())
        del memory
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] == held[0]
    result, replay = capture(lambda: ones * 3)
    ones.fill_(2)
    replay()
    assert result.tolist() == [6.0] * 8


@pytest.mark.gpu
@pytest.mark.parametrize("call", FAILING)
def test_a_failed_capture_keeps_no_memory_of_graphs_that_are_gone(
    call: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    capture, ones, before = CudaGraphs(), torch.ones(8, device="cuda"), reserved()

    def large() -> torch.Tensor:
        return torch.empty(HALF, dtype=torch.uint8, device="cuda")[:8] + ones

    graphs: list[object] = [capture(large) for _ in range(2)]
    with pytest.raises(RuntimeError, match=FAILING[call]):
        capture(lambda: large() + call(ones))
    del capture
    graphs.pop()
    assert reserved() >= before + HALF, "the other graph replays in it"
    graphs.pop()
    assert reserved() < before + HALF


def reserved() -> int:
    """Bytes of the allocator that it cannot give back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.gpu
def test_a_capture_runs_on_the_stream_around_it() -> None:
    stream, seen = torch.cuda.Stream(), []

    def call() -> torch.Tensor:
        seen.append(torch.cuda.current_stream())
        return torch.ones(1, device="cuda")

    with torch.cuda.stream(stream):
        CudaGraphs()(call)
    CudaGraphs()(call)
    assert seen[:2] == [stream, stream] and torch.cuda.default_stream() not in seen


@pytest.mark.gpu
def test_a_failed_graph_is_kept_for_pinned_memory() -> None:
    def graphs() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.cuda.CUDAGraph) for one in gc.get_objects())

    ones, before = torch.ones(8, device="cuda"), graphs()
    with pytest.raises(RuntimeError, match="captur"):
        CudaGraphs()(lambda: ones * ones.sum().item())
    assert graphs() == before + 1
    for _ in range(100):  # torch 2.11 asked a deleted one: a crash, most of the time
        torch.empty(2**16, pin_memory=True)
