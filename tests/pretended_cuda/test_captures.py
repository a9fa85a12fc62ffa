"""What the pretended runtime keeps of a capture, and refuses within one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.pretended_cuda.test_as_cuda import Capture

pytestmark = pytest.mark.gpu


def copy_pageable_memory_by_the_runtime() -> None:
    from pretended_operators.runtime import RUNTIME

    host, x, stream = torch.ones(3), torch.empty(3, device="cuda"), torch.cuda.current_stream().cuda_stream
    pointers = (ctypes.c_void_p(place) for place in (x.data_ptr(), host.data_ptr()))
    RUNTIME.cudaMemcpyAsync(*pointers, ctypes.c_size_t(12), 1, ctypes.c_void_p(stream))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_copy_of_pageable_memory_ends_a_capture() -> None:
    with pytest.raises(RuntimeError, match="captur"):  # at its end: what the runtime gives is not looked at
        Capture().of(copy_pageable_memory_by_the_runtime)


def test_what_a_graph_recorded_is_forgotten_with_it() -> None:
    from pretended_operators import runtime

    def recorded() -> int:
        def call() -> None:
            for _ in range(200):
                torch.ones(2, device="cuda").mul_(2)

        Capture().of(call).reset()
        return len(runtime._recorded)

    first, *_, last = (recorded() for _ in range(8))
    assert last < 3 * first
