"""When gradients are reduced over ranks at ZeRO stages 2 and 3: as they come, after each micro-batch, or once a step.

Stages 0 and 1 reduce once a step. Stages 2 and 3 keep no whole gradient, so they reduce each as it comes, and the owner
of each partition sums. Where few weights train (adapters), each rank can sum its own micro-batches first; a single rank
owns all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toolkit.recipe.batches import LARGEST_WHOLE_GRADIENT
from toolkit.training.optimization.joined_gradients import joins_gradients


def skip_sums_of_one_rank(engine: Any, world_size: int) -> None:
    """Have a single rank keep its gradients as they are.

    At stage 0, and in the bf16 optimizer of stage 1, DeepSpeed copies all gradients into one tensor and back at every
    step, whatever the number of ranks. Its other optimizers sum as the gradients come.
    """
    if world_size == 1 and engine.zero_optimization_stage() <= 1 and not hasattr(engine.optimizer, "reduce_gradients"):
        engine.enable_backward_allreduce = False


def count_no_hooks(engine: Any) -> None:
    """Have DeepSpeed not count, at stages 1 and 2, how many parameters each backward pass will reach.

    It makes two views of every parameter for it. It reads the count only where torch cannot say by itself that a
    backward pass is over, which it can for those that the engine starts.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return
    optimizer, counts = engine.optimizer, engine.optimizer.should_refresh_expected_hook_count
    optimizer.should_refresh_expected_hook_count = lambda: not optimizer._backward_active_depth and counts()


def forget_gradients_at_once(engine: Any) -> None:
    """Have DeepSpeed forget the gradients of a step, at stage 0, without looking for the parameters.

    It walks through all modules and names each of their parameters, which takes a GPU's host longer than the optimizer.
    """
    parameters = list(engine.module.parameters())

    def zero_grad() -> None:
        for parameter in parameters:
            parameter.grad = None

    engine.zero_grad = zero_grad


When = Literal["as they come", "after each pass", "once a step"]


def when_reduced(engine: Any) -> When:
    """When DeepSpeed is to reduce the gradients of this engine's passes, which does not change during a run.

    Once a step where ranks may hold their whole gradient until then and its sums stay exact: what is held is summed in
    the type of the parameters, even with ``data_types.grad_accum_dtype`` fp32. Stage 1 holds it anyway, and so does a
    single rank. After each pass where sums would not be exact, and joining gradients saves calls.
    """
    stage, joins = engine.zero_optimization_stage(), joins_gradients(engine)
    if stage < 2:
        return "once a step" if joins else "as they come"
    if engine.is_deepcompile_active():  # its graphs reduce the gradients
        return "as they come"
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    is_small = sum(_bytes(parameter) for parameter in trained) <= LARGEST_WHOLE_GRADIENT
    if all(parameter.dtype == torch.float32 for parameter in trained):
        return "once a step" if (is_small if engine.dp_world_size > 1 else joins) else "as they come"
    return "after each pass" if is_small and joins else "as they come"


def reduced_once(engine: Any, when: When, micro_batches: int) -> AbstractContextManager[None]:
    """A context for the passes of one step, whose gradients are summed over ranks when it ends, if that is when.

    All ranks have the same number of micro-batches.
    """
    wanted = when == "once a step" and (micro_batches > 1 or joins_gradients(engine))
    return coalesced_reduction(engine) if wanted else nullcontext()


def backward(engine: Any, loss: Tensor, when: When) -> None:
    """One backward pass; its gradients are summed over ranks when it ends, if that is when."""
    with coalesced_reduction(engine) if when == "after each pass" else nullcontext():
        engine.backward(loss, scale_wrt_gas=False)


def _bytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


# Contexts of failed steps. They must not exit: that would start a collective that the other ranks never enter.
_abandoned: list[Any] = []


@contextmanager
def coalesced_reduction(engine: Any) -> Iterator[None]:
    """Gradients stay where backward passes leave them; when it ends they are summed over ranks."""
    reduction = engine.coalesce_grad_reduction()
    reduction.__enter__()
    try:
        yield
    except BaseException:
        _abandoned.append(reduction)
        raise
    reduction.__exit__(None, None, None)
    engine.set_gradient_accumulation_boundary(True)  # the exit has restored the earlier value
