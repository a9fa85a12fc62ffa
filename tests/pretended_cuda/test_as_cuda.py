"""Captures end where CUDA ends them, and compute nothing; hidden rows of attention are 0: as on a real GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from toolkit.planning.hardware import CUBLAS_WORKSPACE

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]


failed: list[torch.cuda.CUDAGraph] = []  # torch asks them at each allocation of pinned memory


class Capture:
    """One capture of torch's, on a stream of its own; where it fails, what torch leaves of it is ended."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def of(self, call: Callable[[], object], *, leaves_generator: bool = False) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        gc.collect()
        with torch.cuda.stream(self.stream):
            self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                call()
                self.graph.capture_end()
            except RuntimeError:
                failed.append(self.graph)
                if torch.cuda.is_current_stream_capturing():
                    with suppress(RuntimeError):
                        self.graph.capture_end()
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
                if not leaves_generator:
                    Capture().of(lambda: None)
                raise
        return self.graph


def wait() -> None:
    torch.cuda.synchronize()


def ask_for_a_number() -> None:
    (torch.ones(3, device="cuda") * 2).sum().item()


def index_by_a_mask() -> None:
    x = torch.ones(3, device="cuda")
    x[x > 0]


def copy_pageable_memory() -> None:
    torch.ones(3).to("cuda")  # torch refuses it


def wait_for_work_outside() -> None:
    other = torch.cuda.Stream()
    torch.cuda.current_stream().wait_event(other.record_event())


def leave_a_stream_unjoined() -> None:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.ones(3, device="cuda").mul_(2)


FORBIDDEN = [
    *(wait, ask_for_a_number, index_by_a_mask, copy_pageable_memory),
    *(wait_for_work_outside, leave_a_stream_unjoined),
]


@pytest.mark.parametrize("call", FORBIDDEN, ids=lambda call: call.__name__)
def test_a_capture_ends_where_cuda_ends_it(call: Callable[[], None]) -> None:
    call()  # outside it is allowed
    with pytest.raises(RuntimeError, match=r"captur|unjoined|uncaptured"):
        Capture().of(call)
    assert not torch.cuda.is_current_stream_capturing()
    assert (torch.ones(3, device="cuda") * 2).tolist() == [2.0] * 3
    torch.cuda.synchronize()


def test_a_capture_may_fork_and_join() -> None:
    x, out = torch.ones(3, device="cuda"), []

    def call() -> None:
        around, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(around)
        with torch.cuda.stream(other):
            out.append(x * 2)
        around.wait_stream(other)

    graph = Capture().of(call)
    x.fill_(4)
    graph.replay()
    assert out[0].tolist() == [8.0] * 3


def test_a_capture_computes_nothing_and_each_replay_all_of_it() -> None:
    table, place, total, copied = (torch.arange(n, device="cuda", dtype=torch.long) for n in (10, 1, 1, 2))

    def call() -> None:
        place.add_(3)
        total.add_(table[place.clone()])  # of real values: what a copy left would be out of bounds
        copied.copy_(torch.cat([place, total]))

    graph = Capture().of(call)
    assert (place.tolist(), total.tolist(), copied.tolist()) == ([0], [0], [0, 1])
    graph.replay()
    assert (place.tolist(), total.tolist(), copied.tolist()) == ([3], [3], [3, 3])
    graph.replay()
    assert (place.tolist(), total.tolist(), copied.tolist()) == ([6], [9], [6, 9])


def test_a_replay_sees_the_numbers_of_the_capture_and_the_memory_of_now() -> None:
    number, pinned = torch.tensor(3.0), torch.full((2,), 5.0).pin_memory()
    x, out = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")

    def call() -> None:
        out.copy_(pinned, non_blocking=True)
        out.add_(x * number)

    graph = Capture().of(call)
    number.fill_(100)
    pinned.fill_(7)
    x.fill_(2)
    graph.replay()
    assert out.tolist() == [13.0] * 2


def test_memory_of_a_graph_is_used_again_within_it() -> None:
    size = 2**20
    x, held = torch.ones(size, device="cuda"), torch.cuda.memory_reserved()

    def call() -> None:
        y = x
        for _ in range(64):
            y = y + 1
        x.copy_(y)

    graph = Capture().of(call)
    assert torch.cuda.memory_reserved() - held < 8 * 4 * size
    graph.replay()
    assert x.unique().tolist() == [65.0]


@pytest.mark.skipif(torch.__version__ >= "2.13", reason="torch ends it itself")
def test_a_failed_capture_leaves_the_generator_within_it() -> None:
    ones = torch.ones(3, device="cuda")
    functional.dropout(ones, 0.5)

    def fails() -> None:
        functional.dropout(ones, 0.5).sum().item()

    with pytest.raises(RuntimeError, match="captur"):
        Capture().of(fails, leaves_generator=True)
    with pytest.raises(RuntimeError, match="captur"):  # toolkit/decoding/step_graphs.py ends that by an empty capture
        functional.dropout(ones, 0.5)
    Capture().of(lambda: None)
    assert set(functional.dropout(ones, 0.5).tolist()) <= {0.0, 2.0}


def test_random_numbers_change_the_state_of_the_generator() -> None:
    ones = torch.ones(3, device="cuda")
    states = [torch.cuda.get_rng_state()]
    for draw in (lambda: functional.dropout(ones, 0.5), lambda: torch.rand(2, device="cuda"), lambda: ones * 2):
        draw()
        states.append(torch.cuda.get_rng_state())
    assert [bool(one.equal(other)) for one, other in pairwise(states)] == [False, False, True]


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="cuBLAS allocates it, which torch's allocator does not count")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="the workspace of newer cards"
)
def test_a_product_takes_the_workspace_that_plans_count_for_each_stream() -> None:
    x = torch.ones(4, 4, device="cuda")
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    for number, stream in enumerate((torch.cuda.default_stream(), torch.cuda.Stream()), start=1):
        with torch.cuda.stream(stream):
            held = [x @ x for _ in range(3)]
        del held
        assert torch.cuda.memory_allocated() - before == number * CUBLAS_WORKSPACE


def test_a_query_from_which_everything_is_hidden_gets_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 8, 8, device="cuda", requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 2, 8, 8, dtype=torch.bool, device="cuda").tril()
    mask[..., :3] = False  # padding on the left, as of prefixes in a search
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] != 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert gradient.isfinite().all() and (gradient[:, :, :3] == 0).all()
