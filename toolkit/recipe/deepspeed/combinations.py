"""Combinations of keys that DeepSpeed refuses late, or accepts and gets wrong."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.cells import BFLOAT, HALF, autocast_type, offload_device, parameter_precision
from toolkit.recipe.deepspeed.compatibility import GPU_ONLY
from toolkit.recipe.tree import Tree, value_at

PRECISIONS = ("bf16", "fp16", "torch_autocast")


def combination_problems(config: Tree, *, has_gpu: bool, world_size: int) -> Iterator[UserError]:
    """One problem for each combination in a DeepSpeed JSON whose keys and types are right."""
    stage = value_at(config, "zero_optimization.stage") or 0
    precision = parameter_precision(config)
    enabled = [name for name in PRECISIONS if value_at(config, f"{name}.enabled")]
    if len(enabled) > 1:
        yield UserError(
            f"{' and '.join(enabled)} are enabled together", f"keep one, e.g. ds.{enabled[-1]}.enabled=false"
        )
    if enabled == ["torch_autocast"]:
        yield from _autocast_problems(autocast_type(config))
    held = value_at(config, "data_types.param_dtype")
    if held and held != precision:
        message = f"data_types.param_dtype={held} and the run holds its parameters in {precision}"
        yield UserError(message, f"set ds.data_types.param_dtype=null, or enable {held}")
    accumulated = value_at(config, "data_types.grad_accum_dtype")
    if stage == 0 and accumulated and accumulated != precision:
        message = f"data_types.grad_accum_dtype={accumulated} with {precision} parameters needs ZeRO stage 1 or more"
        yield UserError(message, "set ds.zero_optimization.stage=1 or ds.data_types=null")
    node = value_at(config, "zero_optimization.zero_hpz_partition_size")
    if has_gpu and isinstance(node, int) and node > 0 and world_size % node:
        key = "ds.zero_optimization.zero_hpz_partition_size"
        yield UserError(
            f"zero_optimization.zero_hpz_partition_size={node} does not divide {world_size} ranks",
            f"on one node set {key}=null: it is for several nodes"
            if world_size < node
            else f"set {key} to the number of GPUs of a node, or {key}=null on one node",
        )
    operation = value_at(config, "gradient_allreduce_op")
    if operation not in (None, "mean"):
        message = f"gradient_allreduce_op={operation}, and the loss is scaled for the mean over ranks"
        yield UserError(message, "set ds.gradient_allreduce_op=mean")
    for dotted, what in GPU_ONLY.items() if not has_gpu else ():
        if value_at(config, dotted):
            yield UserError(f"{dotted} ({what}) needs a GPU", f"take it out of the JSON or set ds.{dotted}=null")
    if not has_gpu and "fp16" in enabled:
        yield UserError("fp16.enabled=true needs a GPU", "set ds.fp16.enabled=false ds.bf16.enabled=true on a CPU")
    yield from _half_precision_problems(config, stage, offload_device(config, "optimizer"))


def _autocast_problems(kind: str | None) -> Iterator[UserError]:
    """The types in which products of fp32 parameters are not computed."""
    if kind in HALF:
        # At stage 0 it scales it, and reports the norm of the scaled gradient.
        message = f"torch_autocast.dtype={kind}: DeepSpeed scales its loss at no ZeRO stage above 0, which fp16 needs"
        yield UserError(
            message, "set ds.torch_autocast.dtype=bfloat16; a backbone that bears fp16 trains by --ds zero2_fp16"
        )
    elif kind not in BFLOAT:
        message = "torch_autocast.enabled=true needs torch_autocast.dtype"
        yield UserError(message, "set ds.torch_autocast.dtype=bfloat16")


def _half_precision_problems(config: Tree, stage: int, offload: str | None) -> Iterator[UserError]:
    """Where DeepSpeed asserts, after the model is made, that it cannot hold master weights or moments in 16 bits."""
    master, states = "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"
    half = "fp16.fp16_master_weights_and_grads"
    given = [
        key
        for key in (master, states, half)
        if value_at(config, key) and value_at(config, f"{key.split('.')[0]}.enabled")
    ]
    if given and stage == 0:
        yield UserError(f"{' and '.join(given)} need ZeRO stage 1, 2 or 3", "set ds.zero_optimization.stage=2")
        return
    on_host = "ds.zero_optimization.offload_optimizer.device=cpu"
    if states in given and master not in given:
        yield UserError(f"{states}=true needs {master}=true", f"set ds.{master}=true")
    if states not in given and master in given and not offload:
        message = f"{master}=true with moments in fp32 needs them offloaded"
        yield UserError(message, f"set {on_host} or ds.{states}=true")
    moments = "optimizer.params.fp32_optimizer_states"
    if states in given and offload and value_at(config, moments) is not False:
        yield UserError(f"{states}=true with offloaded moments needs {moments}=false", f"set ds.{moments}=false")
    if half in given and not offload:
        yield UserError(f"{half}=true needs offloaded moments", f"set {on_host}")
