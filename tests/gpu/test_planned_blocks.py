"""What torch's allocator takes for weights that stay beside what a plan says."""

from __future__ import annotations

import pytest
import torch

from toolkit.planning.costs.blocks import in_blocks

CASES = {
    "t5-base": [768 * 768] * 200 + [768 * 3072] * 40,
    "t5-large": [1024 * 1024, 1024 * 4096, 1024] * 40,
    "llama": [4096 * 4096, 4096 * 1024, 4096 * 14336, 4096] * 8,
    "small": [64, 64 * 64, 512 * 1024 + 1] * 30,
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_weights_take_the_blocks_that_are_counted(case: str) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    kept = [torch.empty(numel, dtype=torch.bfloat16, device="cuda") for numel in CASES[case]]
    taken = torch.cuda.memory_allocated() - before
    numbers = sum(tensor.nbytes for tensor in kept)
    assert numbers <= taken
    assert in_blocks(2 * numel for numel in CASES[case]) == pytest.approx(taken, rel=0.002)
