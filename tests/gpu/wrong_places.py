"""What a rank must not do, one after the other, on a machine whose GPUs are pretended; prints what was noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

WRONG: dict[str, Callable[[], Any]] = {
    "a tensor where nothing was chosen": lambda: torch.zeros(1, device="cuda"),  # GPU 0, and the rank is on 1
    "another rank's GPU": lambda: torch.zeros(1, device="cuda:0"),
    "a copy to another rank's GPU": lambda: torch.zeros(1).to("cuda:0"),
    "a model on another rank's GPU": lambda: torch.nn.Linear(1, 1).cuda(0),
    "another rank's GPU as the current one": lambda: torch.cuda.set_device(0),
    "a GPU that is not there": lambda: torch.cuda.set_device(7),
    "a barrier that guesses": lambda: dist.barrier(),
    "a barrier on another rank's GPU": lambda: dist.barrier(device_ids=[0]),
    "objects over another rank's GPU": lambda: dist.all_gather_object([None], "text"),
    "a tensor of the CPU over NCCL": lambda: dist.all_reduce(torch.zeros(1)),
    "two devices in one sum": lambda: torch.zeros(2, device="cuda:1") + torch.zeros(2),
    "NumPy of a GPU": lambda: torch.zeros(2, device="cuda:1").numpy(),
}


def right() -> str:
    """What a rank does all day."""
    torch.cuda.set_device(1)
    dist.barrier(device_ids=[1])
    layer = torch.nn.Linear(4, 4).to("cuda")
    loss = layer(torch.ones(2, 4, device="cuda")).sum()
    loss.backward()
    gradient = layer.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    dist.all_gather_object([None], "text")
    dist.all_reduce(torch.zeros(1), group=dist.new_group(backend="gloo"))
    return f"{loss.device} {gradient.device} {gradient.cpu().numpy().tolist()[0][0]:g}"


def noticed(wrong: Callable[[], Any]) -> bool:
    try:
        wrong()
    except BaseException as error:
        return type(error).__name__ == "WrongDevice"
    return False


dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
print(json.dumps({name: noticed(wrong) for name, wrong in WRONG.items()} | {"right": right()}))
