"""Kernels that do nothing, by torch's own operators; ``test_counts.py`` starts it where no numbers are wanted."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pretended_operators import counts
from torch.nn import functional


def main() -> None:
    """Fails where a count, or what a failed capture leaves, is not that of torch on a GPU."""
    x = torch.empty(1000, device="cuda")
    before = counts()
    y = (x + 1) * 2
    _ = y.cpu()
    after = {name: number - before[name] for name, number in counts().items()}
    assert (after["kernels"], after["copies"], after["waits"]) == (2, 1, 1), after

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = x + 1
        _ = functional.dropout(z, 0.5)
    before = counts()
    graph.replay()
    graph.replay()
    launched = {name: number - before[name] for name, number in counts().items()}
    # Of the graph itself no kernel; before each replay torch sets the seed and the offset of its random numbers.
    assert (launched["graph_launches"], launched["kernels"]) == (2, 4), launched

    functional.dropout(x, 0.5)
    failed, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        failed.capture_begin(capture_error_mode="thread_local")
        _fails(lambda: functional.dropout(x, 0.5).sum().item())
        _fails(failed.capture_end)
    if torch.__version__ < "2.13":  # torch draws as within the capture; toolkit/decoding/step_graphs.py
        _fails(lambda: functional.dropout(x, 0.5))


def compiled() -> None:
    """Fails where a compiled layer does not become one kernel of Triton, or a GPU's own where numbers are wanted."""

    @torch.compile
    def layer(x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x) * 2 + 1

    x = torch.empty(1000, device="cuda")
    layer(x)  # compiles, and measures
    before = counts()
    layer(x)
    after = {name: number - before[name] for name, number in counts().items()}
    assert (after["triton"], after["kernels"]) == (1, 0), after
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from traffic import Traffic

    with Traffic() as traffic:
        layer(x)
    (work,) = traffic.work.values()
    assert (work.calls, work.bytes) == (1, 2 * 4 * 1000), work


def limited() -> None:
    """Fails unless there are two GPUs of one GiB each."""
    assert torch.cuda.device_count() == 2 and torch.cuda.mem_get_info(1)[1] == 2**30
    memory = torch.empty(2**28, dtype=torch.uint8, device="cuda:1")
    assert torch.cuda.memory_reserved(1) == len(memory) and torch.cuda.memory_reserved(0) == 0
    try:
        torch.empty(2**30, dtype=torch.uint8, device="cuda:1")
    except torch.OutOfMemoryError:
        return
    raise AssertionError("more memory than there is")


def _fails(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except RuntimeError:
        return
    raise AssertionError(f"{call} has not failed")


{"eager": main, "compiled": compiled, "limited": limited}[sys.argv[1]]()
