"""What each of two ranks asserts of NCCL's collectives; ``test_ranks.py`` starts it."""

from __future__ import annotations

import os

import torch
from torch import distributed as dist

LARGE = 9 * 2**20  # float32 elements: more than one part of the memory that the ranks share


def main() -> None:
    """Fails where a number is wrong."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        x = torch.tensor([1, 2, 3, 4], dtype=dtype, device="cuda") * (rank + 1)
        for operation, expected in (
            (dist.ReduceOp.SUM, [3, 6, 9, 12]),
            (dist.ReduceOp.MAX, [2, 4, 6, 8]),
            (dist.ReduceOp.MIN, [1, 2, 3, 4]),
            (dist.ReduceOp.PRODUCT, [2, 8, 18, 32]),
        ):
            total = x.clone()
            dist.all_reduce(total, operation)
            assert total.tolist() == expected, (dtype, operation, total)
    x = torch.arange(4.0, device="cuda") + 10 * rank
    mean = x.clone()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.tolist() == [5.0, 6.0, 7.0, 8.0]
    both = torch.empty(8, device="cuda")
    dist.all_gather_into_tensor(both, x)
    assert both.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    half = torch.empty(2, device="cuda")
    dist.reduce_scatter_tensor(half, x)
    assert half.tolist() == ([10, 12] if rank == 0 else [14, 16])
    given = x.clone()
    dist.broadcast(given, src=1)
    assert given.tolist() == [10, 11, 12, 13]
    large = torch.full((LARGE,), float(rank + 1), device="cuda")
    dist.all_reduce(large)
    assert large.min().item() == large.max().item() == 3.0
    own = dist.new_group([rank]) if rank == 0 else dist.new_group([0])
    if rank == 0:
        dist.all_reduce(x, group=own)
        assert x.tolist() == [0, 1, 2, 3]
    _replayed(rank)
    dist.barrier()
    dist.destroy_process_group()


def _replayed(rank: int) -> None:
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        dist.all_reduce(x)
        x.add_(1)
    assert x.tolist() == [1.0] * 3
    x.fill_(rank)
    graph.replay()
    assert x.tolist() == [2.0] * 3


main()
