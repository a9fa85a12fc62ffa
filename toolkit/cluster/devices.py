"""The one device on which a rank computes.

torch keeps a current GPU for each thread, by default number 0, and uses it wherever no GPU is named: NCCL's object
collectives and barriers, bitsandbytes, the weights that ZeRO-3 gathers. So a command makes the rank's GPU the current
one before it builds anything, and code that places a tensor calls :func:`own_device`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from toolkit.cluster.ranks import Ranks
from toolkit.errors import UserError

OF_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU of the machine
UNBOUND_BARRIER = r"barrier\(\): using the device under current context"  # torch's warning


def use_device(ranks: Ranks) -> torch.device:
    """Make the rank's device the current one; call it in the main thread, before anything is built.

    Returns:
        the GPU of the rank's number on its node, or the only one that it sees (srun and mpirun can bind one to each
        rank); the CPU where there is none.
    """
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(0 if gpus == 1 else ranks.local_rank)
        _leave_out_kernels()
    return own_device()


def choose_device(name: str | None) -> torch.device:
    """Make the device that a user named the current one, for a command without ranks.

    The name is ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    _leave_out_kernels()
    if name is None:
        return own_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device {name}: {str(error).splitlines()[0]}", "write cpu, cuda or cuda:N, or leave --device out"
        ) from error
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if (device.index or 0) >= gpus:
            raise UserError(
                f"--device {name}: torch sees {gpus} GPUs here, numbered from 0",
                "name one of them, or leave --device out",
            )
        torch.cuda.set_device(device.index or 0)
        return own_device()
    return device


def own_device() -> torch.device:
    """The device of this process: the current GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def unseen_gpus(of_driver: Path = OF_DRIVER) -> str | None:
    """A note that this machine has GPUs and torch sees none of them; None where it is not so, or they are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(of_driver.iterdir())) if of_driver.is_dir() else 0
    if not there or visible == "" or torch.cuda.device_count():
        return None
    reason = f"torch {torch.__version__} is built without CUDA"
    if torch.version.cuda:
        names_none = f", or CUDA_VISIBLE_DEVICES={visible} names none" if visible else ""
        reason = f"the driver does not answer, or is too old for CUDA {torch.version.cuda}{names_none}"
    return f"the run uses CPUs: {there} GPU{'s are' if there > 1 else ' is'} here, and torch sees none ({reason})"


def _leave_out_kernels() -> None:
    """Leave out kernels that are made while a run computes.

    cuDNN's of ``scaled_dot_product_attention``, which takes the next one that fits, builds a plan for each new pair of
    batch size and length, and batches of signing have a new one nearly every time: a third of a step's host time with
    T5-Base on an H100 (5.4 ms a call), and 2.5 times the step in FunASR#3704.

    Triton's, by which torch 2.13 computes outer products outside of compiled layers: they need a C compiler and a
    folder that can be written, by default ``~/.triton``, and end the run where there is none.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    native: Any = getattr(torch.backends, "python_native", None)  # since torch 2.13
    if native is not None:
        native.triton.enabled = False


def attention_kernels() -> list[str]:
    """The kernels that ``scaled_dot_product_attention`` may choose from on a GPU; there is one on a CPU."""
    if own_device().type == "cpu":
        return ["cpu"]
    kernels = torch.backends.cuda
    enabled = {
        "flash": kernels.flash_sdp_enabled(),
        "memory-efficient": kernels.mem_efficient_sdp_enabled(),
        "cudnn": kernels.cudnn_sdp_enabled(),
        "math": kernels.math_sdp_enabled(),
    }
    return [name for name, is_enabled in enabled.items() if is_enabled]


def barrier() -> None:
    """Wait for all ranks of the default process group.

    NCCL's barrier is an all-reduce, which needs a device. Without one it derives it from the global rank, which names
    another rank's GPU where nodes differ in their number of ranks.
    """
    device = own_device()
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def check_bound() -> None:
    """Check that the default process group of several ranks is bound to the rank's GPU.

    DeepSpeed binds it by LOCAL_RANK, and leaves the group of a single rank unbound (DeepSpeed#8248: binding it fails on
    some machines). torch warns of that at each of DeepSpeed's barriers, which wait for nobody then: that is left out.

    Raises:
        RuntimeError: it is bound to another GPU, or to none.
    """
    device = own_device()
    if device.type == "cuda" and dist.get_world_size() == 1:
        warnings.filterwarnings("ignore", message=UNBOUND_BARRIER)
    bound = getattr(dist.group.WORLD, "bound_device_id", None)
    if device.type == "cuda" and dist.get_world_size() > 1 and bound != device:
        raise RuntimeError(f"rank {dist.get_rank()} computes on {device}, and its process group is bound to {bound}")
