"""The weights that ZeRO stage 3 has cut into pieces, whole for the length of an evaluation where they fit.

Gathered once they cost one pass over the network; gathered layer by layer they cost one for every token of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

# Share of the free memory that weights may take; the rest is for activations and the beams' key-value caches.
LARGEST_SHARE = 0.5


@contextmanager
def whole_weights(engine: Any, *, gather: bool | None = None) -> Iterator[bool]:
    """Within it every rank holds all weights, if they fit, and may generate at its own pace. All ranks must enter.

    Args:
        engine: the DeepSpeed engine, at any stage.
        gather: whether to gather; None = if they fit.

    Yields:
        whether ranks must generate in step, because every layer is gathered when it is needed.
    """
    import deepspeed

    if engine.zero_optimization_stage() < 3:
        yield False
    elif not (fits_whole(engine) if gather is None else gather):
        yield True
    else:
        # Gathering alone would not do: DeepSpeed's hooks let go of each layer's weights after its first use.
        with deepspeed.zero.unwrap_model_for_generation(engine):
            yield False


def fits_whole(engine: Any) -> bool:
    """Whether every rank has room for all weights at once; all ranks ask, and get the same answer."""
    parameters = engine.module.parameters()
    needed = sum(getattr(item, "ds_numel", item.numel()) * item.element_size() for item in parameters)
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = psutil.virtual_memory().available // dist.get_world_size()
    fits = torch.tensor(float(needed < LARGEST_SHARE * free), device=engine.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits.item())


def cut(model: Any, world_size: int) -> Any:
    """Cut a model's weights over the ranks, for evaluation alone; the process group must be there.

    Returns:
        a DeepSpeed engine at stage 3 without an optimizer.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
