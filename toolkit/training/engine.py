"""The DeepSpeed engine: parameter groups in, an engine whose learning rate the loop sets out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.cluster.cores import share_of_cores, usable_cores
from toolkit.cluster.devices import barrier, check_bound, use_device
from toolkit.cluster.interfaces import name_interface
from toolkit.cluster.meeting import meet, part
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.shared_memory import release_own_buffer, remove_orphaned_buffers
from toolkit.models.quick.layers import use_quick_layers
from toolkit.recipe.resolve import ResolvedRun, value_at
from toolkit.tracking.secrets import RedactingFormatter
from toolkit.training.cpu_communication import communicate_on_cpu
from toolkit.training.optimizers import client_optimizer, parameter_groups
from toolkit.training.shards import base_optimizer

# A collective ends this much later than the longest permitted wait, so that the rank that is late says why first.
GRACE_SECONDS = 60.0


def join_process_group(ranks: Ranks, longest_wait: float = 0.0) -> None:
    """Bring the ranks together, each on its device; a lone process becomes a group of one.

    Args:
        ranks: which rank this is.
        longest_wait: seconds for which a rank may be late for a collective; never fewer than DeepSpeed grants.
    """
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    meet(ranks)
    name_interface(ranks)
    device = use_device(ranks)  # not before: a GPU brings threads, and a run has forked its loader's workers by now
    if "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # DeepSpeed takes LOCAL_RANK for the number of a GPU: that of the only one that a rank sees is 0.
    number = ranks.local_rank if device.index is None else device.index
    os.environ |= {"RANK": str(ranks.rank), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks.world_size)}
    os.environ.setdefault("LOCAL_SIZE", str(ranks.local_world_size))
    if ranks.local_rank == 0:
        remove_orphaned_buffers()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it found its op
        deepspeed.init_distributed(
            verbose=False, timeout=max(default_pg_timeout, timedelta(seconds=longest_wait + GRACE_SECONDS))
        )
    check_bound()
    barrier()
    release_own_buffer(ranks.rank)


def leave_process_group() -> None:
    """Leave the group, if there is one; never on the way out of an error, because it waits for the other ranks."""
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    part()


class _LogFile(logging.FileHandler):
    """A log that cannot be written, on a full disk, buries nothing that the terminal says."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def quieten(log: Path | None) -> None:
    """Send what DeepSpeed, transformers and we log to a file (or nowhere), so that the terminal shows the run.

    No secret of the environment reaches the file.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed  # it sets up its logging as it is imported

        deepspeed.accelerator.get_accelerator()
    handler = _LogFile(log, encoding="utf-8") if log else logging.NullHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("toolkit", "DeepSpeed", "transformers", "datasets", "torch", "bitsandbytes", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def make_engine(module: nn.Module, resolved: ResolvedRun) -> tuple[Any, list[tuple[str, float]]]:
    """Hand the model to DeepSpeed; on CPUs its layers take their quick forms first.

    Returns:
        the engine, and the name and peak learning rate of each of its parameter groups.
    """
    import deepspeed

    if not torch.cuda.is_available():
        use_quick_layers(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, resolved),
        optimizer=client_optimizer(resolved),
        config=resolved.deepspeed,
    )
    if not torch.cuda.is_available():
        communicate_on_cpu(engine, resolved)
    if value_at(resolved.deepspeed, "compile.deepcompile"):
        engine.compile()  # asked for in the JSON alone, DeepSpeed compiles nothing and says so in its log
    return engine, [(group["name"], group["lr"]) for group in engine.optimizer.param_groups]


def set_learning_rate(engine: Any, peaks: list[tuple[str, float]], factor: float, backbone_factor: float) -> None:
    """Set every group's learning rate to its peak times the factor of what it belongs to."""
    for group, (name, peak) in zip(engine.optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * (backbone_factor if name == "backbone" else factor)


def release_training_states(engine: Any) -> None:
    """Give back the memory that only training needs: gradients, master weights, moments and buckets.

    The weights stay, cut or whole, and so does what gathers them: the engine goes on to evaluate, and trains no more.
    DeepSpeed's ``destroy`` would take the hooks that gather and leave the memory, which closures hold on to (0.19.8).
    """
    for parameter in engine.module.parameters():
        parameter.grad = None
    tensors = (*engine.module.parameters(), *engine.module.buffers())
    pieces = (parameter.ds_tensor for parameter in tensors if hasattr(parameter, "ds_tensor"))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *pieces)}
    for tensor in _tensors_in([vars(engine.optimizer), vars(base_optimizer(engine))], set()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.resizable():
            storage.resize_(0)  # whoever else holds the tensor, or a view of it, holds no memory


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor in nested dictionaries, sequences and dataclasses."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_in(item, seen)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in(vars(value), seen)


def use_threads(ranks: Ranks) -> None:
    """Share the cores of a machine without GPUs among its ranks; all of them call this, in the group if there is one.

    OMP_NUM_THREADS, which `deepspeed --bind_cores_to_rank` and torchrun set, decides where it is set.
    """
    if torch.cuda.is_available():
        return
    from torch import distributed as dist

    own = usable_cores()
    everybody: list[Any] = [own] * ranks.world_size
    if dist.is_initialized():
        dist.all_gather_object(everybody, own)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), share_of_cores(own, everybody)))


def peak_memory_gib() -> float:
    """Largest memory that this rank has held: of its GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
