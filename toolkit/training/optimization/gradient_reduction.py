"""When the ranks send each other their gradients at ZeRO stages 2 and 3: at every micro-batch, or once a step.

Stages 0 and 1 send once a step. Stages 2 and 3 keep no gradient whole, so each micro-batch is sent as it comes, and its
owner sums. Where what trains is small (adapters), each rank may as well sum its own micro-batches and send the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

LARGEST_WHOLE_GRADIENT = 2**27
"""Bytes that a rank may hold for the sake of sending once.

An adapter of rank 16 on T5-3B and the pose encoder have 12 M weights, 45 MiB; one of rank 64 still fits. Whoever trains
all of a T5-Base has 1 GiB, and chose these stages so as not to hold it.
"""


def sent_once(engine: Any, micro_batches: int) -> AbstractContextManager[None]:
    """Within it come the backward passes of one step; afterwards their gradients are summed over ranks.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage.
        micro_batches: of this step, the same number on all ranks.
    """
    return _sent_once(engine) if micro_batches > 1 and keeps_gradient(engine) else nullcontext()


def keeps_gradient(engine: Any) -> bool:
    """Whether ranks hold their whole gradient until the step.

    Only where it is small, and where adding to it loses nothing: DeepSpeed adds in the type of the parameters, also
    where ``data_types.grad_accum_dtype`` asks for fp32.
    """
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    return (
        engine.zero_optimization_stage() >= 2
        and engine.dp_world_size > 1
        and not engine.is_deepcompile_active()  # its graphs send the gradients
        and all(parameter.dtype == torch.float32 for parameter in trained)
        and sum(_bytes(parameter) for parameter in trained) <= LARGEST_WHOLE_GRADIENT
    )


def _bytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


# Of steps that have failed, never to be left: leaving would send gradients to ranks that do not wait for them.
_abandoned: list[Any] = []


@contextmanager
def _sent_once(engine: Any) -> Iterator[None]:
    reduction = engine.coalesce_grad_reduction()
    reduction.__enter__()
    try:
        yield
    except BaseException:
        _abandoned.append(reduction)
        raise
    reduction.__exit__(None, None, None)
    engine.set_gradient_accumulation_boundary(True)  # it has put back what was set before it
