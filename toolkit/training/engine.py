"""The DeepSpeed engine: how it is made, its learning rates, its gradient norm, the release of its training states."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.checkpointing.zero_shards import base_optimizer, shards
from toolkit.cluster.devices import attention_kernels
from toolkit.cluster.logs import import_deepspeed, prints_to_log
from toolkit.cluster.ops import use_compile_cache
from toolkit.cluster.tensor_parallel import make_groups, note_parts, total_norm
from toolkit.cpu.allocator import keep_few_kernels, keep_freed_memory, return_freed_memory
from toolkit.cpu.communication import communicate_on_cpu
from toolkit.cpu.layers import use_cpu_layers
from toolkit.cpu.switch import uses_cpu_code
from toolkit.models.compiled import WORTH, compile_layers
from toolkit.models.gpu_layers import use_gpu_layers
from toolkit.models.language_models.tensor_plan import partition_plan, split_weights
from toolkit.recipe.compilation import compilation
from toolkit.recipe.optimizers import loop_clips
from toolkit.recipe.resolve import ResolvedRun, value_at
from toolkit.training.optimization.bf16_sums import join_sums
from toolkit.training.optimization.freezing import restart_steps
from toolkit.training.optimization.gradient_reduction import (
    count_no_hooks,
    forget_gradients_at_once,
    skip_sums_of_one_rank,
)
from toolkit.training.optimization.joined_gradients import join_gradients
from toolkit.training.optimization.optimizers import client_optimizer, parameter_groups

log = logging.getLogger("toolkit")


def import_libraries(resolved: ResolvedRun) -> None:
    """Import what building the run's engine imports otherwise; seconds, which processes that are forked later save."""
    import_deepspeed()
    from deepspeed.module_inject import auto_ep_layer  # noqa: F401 - as its engine does
    from deepspeed.ops.op_builder import all_ops  # noqa: F401 - as its process group does; it imports setuptools

    if resolved.zero_stage:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401 - as ZeRO does; it imports torch's compiler
    if resolved.recipe.model.lora:
        import peft  # noqa: F401


def set_allocator(resolved: ResolvedRun) -> None:
    """Have this rank, if it is on the CPU, keep freed memory or return it, as its run needs."""
    if not uses_cpu_code():
        return
    in_autocast = bool(value_at(resolved.deepspeed, "torch_autocast.enabled"))
    if resolved.zero_stage == 3 or resolved.recipe.model.quantization:
        return_freed_memory()
    else:
        keep_freed_memory(maps_large=in_autocast)
    if resolved.precision == "fp32" and not in_autocast:
        keep_few_kernels()  # convolutions alone have any, and each length of a batch its own


def make_engine(module: nn.Module, resolved: ResolvedRun) -> tuple[Any, list[tuple[str, float]]]:
    """Give the model to DeepSpeed; its layers are replaced by faster ones, and compiled, first.

    Returns:
        the engine, and the name and peak learning rate of each of its parameter groups.
    """
    import deepspeed

    layers = compilation(resolved.recipe, resolved.deepspeed, has_gpu=torch.cuda.is_available())
    log.info("layers: %s", layers.in_words())
    if uses_cpu_code() and not (layers.compiles or layers.graphs):
        use_cpu_layers(module, linear=resolved.tensor_parallel_size == 1)
    else:
        use_gpu_layers(module)
    if layers.compiles:
        if note := use_compile_cache():
            log.warning(note)
        compile_layers(module, worth=WORTH if resolved.recipe.training.compile == "auto" else 0.0)
    log.info(_attention_line(module))
    gc.collect()
    with prints_to_log(), out_of_collections():
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, resolved),
            optimizer=client_optimizer(resolved),
            **divided(module, resolved),
        )
    if resolved.tensor_parallel_size > 1:
        note_parts(module, split_weights(module))
    skip_sums_of_one_rank(engine, resolved.data_parallel_size)
    count_no_hooks(engine)
    if not resolved.zero_stage:
        forget_steps(engine)
    forget_gradients_at_once(engine)
    if resolved.tensor_parallel_size == 1:  # else DeepSpeed counts what ranks of a group share once, by parameter
        join_gradients(engine)
        join_sums(engine)
    if uses_cpu_code():
        communicate_on_cpu(engine, resolved)
    if value_at(resolved.deepspeed, "compile.deepcompile"):
        engine.compile()  # the setting alone compiles nothing
    return engine, [(group["name"], group["lr"]) for group in engine.optimizer.param_groups]


def forget_steps(engine: Any) -> None:
    """Have the optimizer count from 0: DeepSpeed steps that of half precision at stage 0 with zeros as it makes it.

    Adam's first step would be three quarters of one, by the bias correction of a second (DeepSpeed 0.19.8).
    """
    for counted in (*(shard.state for shard in shards(engine)), *base_optimizer(engine).param_groups):
        restart_steps(counted)


@contextmanager
def out_of_collections() -> Iterator[None]:
    """Leave the objects that are there out of collections of garbage within the context, unless some are left out.

    DeepSpeed collects a dozen times while it makes an engine, a third of a second each with all that libraries hold,
    and a collection in a fork copies the pages that it marks.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def divided(module: nn.Module, resolved: ResolvedRun) -> dict[str, Any]:
    """The JSON for ``deepspeed.initialize``; with AutoTP which weights it splits, too, and the ranks' groups.

    Without the groups DeepSpeed would hold ``train_batch_size`` against the number of all ranks.
    """
    size = resolved.tensor_parallel_size
    if size == 1:  # also where the JSON says so
        return {"config": {key: value for key, value in resolved.deepspeed.items() if key != "tensor_parallel"}}
    section = resolved.deepspeed["tensor_parallel"] | partition_plan(module.backbone)
    return {"config": {**resolved.deepspeed, "tensor_parallel": section}, "mpu": make_groups(size)}


def _attention_line(module: nn.Module) -> str:
    """Which attention the model runs, for the log."""
    parts = getattr(module, "backbone", module).modules()
    names = [part.config._attn_implementation for part in parts if isinstance(part, PreTrainedModel)]
    functions = sorted({name for name in names if name})
    return f"attention: {', '.join(functions)}; kernels enabled for sdpa: {', '.join(attention_kernels())}"


def set_learning_rate(engine: Any, peaks: list[tuple[str, float]], factor: float, backbone_factor: float) -> None:
    """Set each group's learning rate to its peak times a factor, that of the backbone or that of the rest."""
    for group, (name, peak) in zip(engine.optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * (backbone_factor if name == "backbone" else factor)


def gradient_norm(weights: Iterable[nn.Parameter]) -> torch.Tensor:
    """Norm of the gradient at ZeRO stage 0, before the optimizer step: DeepSpeed reports none there.

    Gradients are whole and summed over ranks by then, and not yet clipped.

    Returns:
        one number, on the device.
    """
    # Each look at a gradient makes a Python object.
    found = [(gradient, weight) for weight in weights if (gradient := weight.grad) is not None]
    return total_norm([gradient for gradient, _ in found], [weight for _, weight in found])


def clip_gradients(engine: Any, weights: Iterable[nn.Parameter], norm: float | None, largest: float) -> None:
    """Scale gradients in place to the norm ``largest`` where their ``norm`` is greater, unless DeepSpeed clips.

    What DeepSpeed does not clip is what ``recipe.optimizers.loop_clips`` names; with ``largest`` 0 nothing is.
    """
    if norm is not None and norm > largest > 0 and not engine.gradient_clipping():
        # As `nn.utils.clip_grads_with_norm_`, which copies the norm to the device, and waits for that.
        gradients = [gradient for weight in weights if (gradient := weight.grad) is not None]
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))


def take_step(engine: Any, resolved: ResolvedRun, weights: Iterable[nn.Parameter], norm: float | None) -> bool:
    """Clip the gradient and change the weights, unless it is not finite: then it is forgotten, and they stay.

    DeepSpeed does both, except where the loop clips: torch's optimizer would make NaN of every weight there.

    Args:
        engine, weights: of the run.
        norm: of the gradient; None above stage 0.

    Returns:
        whether the weights were changed.
    """
    is_finite = norm is None or math.isfinite(norm)
    if is_finite or not loop_clips(resolved.deepspeed):
        clip_gradients(engine, weights, norm, resolved.recipe.training.gradient_clipping)
        engine.step()
        return is_finite and bool(engine.was_step_applied())
    engine.zero_grad()
    engine.global_steps += 1
    engine.skipped_steps += 1
    return False


def release_training_states(engine: Any) -> None:
    """Free the memory that only training needs: gradients, master weights, moments and buckets.

    The weights stay, partitioned or whole, and so do the hooks that gather them: the engine can still evaluate.
    DeepSpeed's ``destroy`` would remove the hooks and free nothing, because closures hold the memory (0.19.8).
    """
    for parameter in engine.module.parameters():
        parameter.grad = None
    tensors = (*engine.module.parameters(), *engine.module.buffers())
    partitions = (parameter.ds_tensor for parameter in tensors if hasattr(parameter, "ds_tensor"))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *partitions)}
    for tensor in _tensors_in([vars(engine.optimizer), vars(base_optimizer(engine))], set()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.resizable():
            storage.resize_(0)  # other references to the tensor, or views of it, hold no memory then


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor in nested dictionaries, sequences and dataclasses, and the gradients that they hold."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad  # where offload keeps the gradient of a sub-group
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_in(item, seen)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in(vars(value), seen)
