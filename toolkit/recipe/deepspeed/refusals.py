"""Keys that DeepSpeed reads and that do nothing here, or harm: why, and what to use instead.

Read in the source of DeepSpeed 0.19.8, for a training loop that marks its own accumulation boundaries and writes its
own checkpoints. A key that is refused stops the run before it starts; one that is idle is removed with a note. A key
in neither table is obeyed. A value that requests nothing (false, an empty section, ``"enabled": false``, DeepSpeed's
default) is removed without a note.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.aliases import PlaceOf
from toolkit.recipe.tree import Tree, leaves, value_at, without


@dataclass(frozen=True)
class Refusal:
    """A key that stops the run, or one that is removed with a note (``IDLE``)."""

    key: str  # dotted; a section is refused with all that is in it
    reason: str  # a clause
    instead: tuple[str, ...] = ()  # arguments of the command line that do what the key was for; may be empty
    default: Any = None  # DeepSpeed's own value, which requests nothing; of a section, its values by key
    when: Callable[[Tree, int], bool] | None = None  # whether it is refused in this JSON on so many ranks


def _several_ranks(config: Tree, world_size: int) -> bool:
    return world_size > 1


def _autocast(config: Tree, world_size: int) -> bool:
    return bool(value_at(config, "torch_autocast.enabled"))


def _old_and_bf16(config: Tree, world_size: int) -> bool:
    return bool(value_at(config, "bf16.enabled")) and _installed("deepspeed") < ZERO_PLUS_PLUS_IN_BF16


def _scatters(config: Tree, world_size: int) -> bool:
    scatters = value_at(config, "zero_optimization.reduce_scatter") is not False
    return scatters and value_at(config, "zero_optimization.stage") in (2, 3)


def _installed(package: str) -> tuple[int, ...]:
    """The version of an installed package, as far as it is numbers."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(package))[:3])
    except importlib.metadata.PackageNotFoundError:  # nothing will train here; a recipe can still be looked at
        return (10**6,)


ZERO_PLUS_PLUS_IN_BF16 = (0, 19, 6)
REMOVED = "DeepSpeed has removed it (DeepSpeed#8489)"
OWN_CHECKPOINTS = "checkpoints are this toolkit's own: DeepSpeed writes and reads none of them"
NO_EXPERTS = "the backbones have no experts"
SCATTERED = "DeepSpeed refuses it where gradients are scattered: ZeRO stages 2 and 3"
OWN_PLAN = "which weights are split is what transformers says of the model (its tp_plan)"
QUANTISED = ("model.quantization=nf4", "model.lora.r=16")
OFFLOAD = "zero_optimization.offload_optimizer"

REFUSALS: tuple[Refusal, ...] = (
    # --- what DeepSpeed no longer has
    Refusal("amp", REMOVED, ("--ds zero2",)),
    Refusal("compression_training", REMOVED),
    Refusal("curriculum_learning", REMOVED),
    Refusal("eigenvalue", REMOVED),
    Refusal("elasticity", "DeepSpeed has removed it; the batch is the recipe's on any number of ranks"),
    Refusal("graph_harvesting", REMOVED),
    Refusal("nebula", REMOVED),
    Refusal("progressive_layer_drop", REMOVED),
    Refusal("quantize_training", REMOVED, QUANTISED),
    Refusal("sparse_attention", REMOVED),
    Refusal("sparse_gradients", REMOVED),
    Refusal("zero_optimization.legacy_stage1", "DeepSpeed has removed it", ("--ds zero1",)),
    Refusal("zero_optimization.mics_hierarchical_params_gather", REMOVED),
    Refusal("zero_optimization.mics_shard_size", REMOVED, default=-1),
    Refusal("zero_optimization.zeropp_loco_param", REMOVED),
    # --- what the recipe owns
    Refusal("activation_checkpointing", "the recipe turns it on", ("training.gradient_checkpointing=true",)),
    Refusal("autotuning", "its tuner ends the process; python launch/plan.py --tune tries JSONs and micro-batches"),
    Refusal("comet", "the engine would start a second tracker", ("tracking.wandb=offline",)),
    Refusal("data_efficiency", "the recipe owns the order and the sampling of clips"),
    Refusal("dataloader_drop_last", "batches are the recipe's; no clip is dropped"),
    Refusal(
        "managed_gradient_accumulation", "the training loop marks the accumulation boundaries itself", default=True
    ),
    Refusal("wandb", "the engine would start a W&B run of its own in the same process", ("tracking.wandb=offline",)),
    Refusal("optimizer.params.adam_w_mode", "the recipe's optimizer is AdamW", default=True),
    Refusal("optimizer.params.amsgrad", "the recipe's optimizer is AdamW"),
    Refusal("optimizer.params.bias_correction", "the recipe's optimizer is AdamW", default=True),
    # --- other ways to divide a model
    Refusal("expert_parallel", NO_EXPERTS),
    Refusal("hybrid_engine", "it serves reinforcement learning alone"),
    Refusal("pipeline", "the model is not a pipeline of layers"),
    Refusal("sequence_parallel_size", "sequences are not split over ranks", default=1),
    *(
        Refusal(f"tensor_parallel.{key}", OWN_PLAN, default=default)
        for key, default in {
            "tp": None,
            "tensor_parallel": None,
            "injection_policy_tuple": None,
            "partition_config": None,
            "preset_model": None,
            "vocab_parallel_lm_head": False,
            "vocab_parallel_ce_backend": "torch",
        }.items()
    ),
    Refusal("tensor_parallel.dtype", "the JSON's precision is the model's (ds.bf16)"),
    Refusal("tensor_parallel.tp_overlap_comm", "losses with it were not compared with those of one rank"),
    Refusal("tensor_parallel.keep_module_on_host", "weights are loaded onto the rank's device"),
    Refusal("tensor_parallel.kernel_inject", "its kernels are for inference"),
    Refusal("tensor_parallel.replace_with_kernel_inject", "its kernels are for inference"),
    Refusal("use_data_before_expert_parallelism", NO_EXPERTS),
    # --- what would be missing in every checkpoint
    Refusal(
        "zero_optimization.zenflow",
        "the weights that it chooses move at every micro-batch before the boundary that the training loop marks, and "
        "their moments are in no checkpoint",
        ("--ds zero2_offload",),
    ),
    Refusal(
        f"{OFFLOAD}.super_offload",
        "below ZeRO stage 3 DeepSpeed ignores it, and at stage 3 the moments live in another process and are in no "
        "checkpoint",
        ("--ds zero3_offload",),
    ),
    Refusal(
        f"{OFFLOAD}.ratio",
        "the part that stays on the device has an optimizer of its own, whose moments are in no checkpoint",
        ("--ds zero3_offload",),
        default=1,
    ),
    # --- checkpoints
    Refusal(
        "checkpoint.load_universal",
        f"{OWN_CHECKPOINTS}, and they resume on any number of ranks and at any ZeRO stage without being converted",
    ),
    Refusal(
        "checkpoint",
        OWN_CHECKPOINTS,
        default={"tag_validation": "Warn", "checkpoint_serialization": True},
    ),
    Refusal("datastates_ckpt", OWN_CHECKPOINTS),
    Refusal("zero_optimization.elastic_checkpoint", OWN_CHECKPOINTS),
    Refusal("zero_optimization.load_from_fp32_weights", OWN_CHECKPOINTS, default=True),
    Refusal("zero_optimization.pipeline_loading_checkpoint", OWN_CHECKPOINTS),
    # --- precision
    Refusal(
        "data_types.keep_in_fp32_modules",
        "DeepSpeed keeps buffers alone in fp32, not the parameters of these modules",
        ("--ds zero2_autocast",),
        default="auto",
    ),
    Refusal("weight_quantization", "DeepSpeed quantises for inference", QUANTISED),
    Refusal(
        "zero_optimization.zero_quantized_nontrainable_weights",
        "DeepSpeed packs what is frozen when it divides the parameters, and here adapters freeze them afterwards",
        QUANTISED,
    ),
    *(
        Refusal(
            f"zero_optimization.{key}",
            "in bf16 it needs deepspeed>=0.19.6 (DeepSpeed#8215): pip install 'deepspeed>=0.19.6,<0.20'",
            ("--ds zero3",),
            when=_old_and_bf16,
        )
        for key in ("zero_quantized_weights", "zero_quantized_gradients")
    ),
    Refusal(
        "zero_optimization.zero_quantized_weights",
        "DeepSpeed refuses it with torch_autocast",
        ("--ds zero3_plus_plus",),
        when=_autocast,
    ),
    # --- communication
    Refusal("prescale_gradients", SCATTERED, ("--ds zero1",), when=_scatters),
    Refusal("gradient_predivide_factor", SCATTERED, ("--ds zero1",), default=1, when=_scatters),
    Refusal(
        "zero_optimization.compute_grad_norm", "every step clips by the gradient's norm or reports it", default=True
    ),
    # --- compilation
    Refusal(
        "compile.deepcompile",
        "the lengths of batches differ by rank, and DeepCompile then hangs on more than one (DeepSpeed#7611)",
        ("--ds zero3",),
        when=_several_ranks,
    ),
    Refusal("compile.autoep_non_moe", NO_EXPERTS),
    Refusal(
        "compile.passes",
        "they split sequences or tensors over ranks; what divides parameters DeepCompile adds by itself",
        ("--ds zero3",),
    ),
)

IDLE: tuple[Refusal, ...] = (
    Refusal("disable_allgather", "DeepSpeed reads it and does nothing with it"),
    Refusal("vocabulary_size", "DeepSpeed only warns of some sizes"),
    Refusal("seq_parallel_communication_data_type", "sequences are not split over ranks", default="fp32"),
    Refusal("zero_allow_untested_optimizer", "it is set where the recipe's optimizer needs it", default=True),
    Refusal("zero_force_ds_cpu_optimizer", "it is set where the recipe's optimizer needs it", default=True),
    Refusal("fp16.auto_cast", "the model casts what it is given"),
    Refusal("zero_optimization.allgather_partitions", "DeepSpeed reads it and does nothing with it", default=True),
    Refusal("zero_optimization.stage3_gather_16bit_weights_on_model_save", "best/ always holds whole weights"),
    Refusal("zero_optimization.stage3_gather_fp16_weights_on_model_save", "best/ always holds whole weights"),
    Refusal("zero_optimization.save_muon_momentum_buffer_in_memory", "muon is not offloaded to nvme"),
    Refusal(f"{OFFLOAD}.cpuadam_cores_perc", "only super_offload reads it", default=0.8),
)

REFUSED = {refusal.key for refusal in REFUSALS}

STAGE_3 = (
    "sub_group_size",
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "leaf_module",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
)
STAGES_1_AND_2 = (
    "allgather_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
)
LOGGED = ("steps_per_print", "dump_state")  # DeepSpeed logs these on a level that is off by default
NVME = {
    "offload_optimizer": ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
    "offload_param": ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
}


def without_refused_and_idle(
    config: Tree, world_size: int, place_of: PlaceOf, problems: list[UserError], notes: list[str]
) -> Tree:
    """``config`` without what is refused (a problem each) and what is idle (a note, where it requests something).

    Keys and types of ``config`` are right; ``place_of`` is how messages name the place of a key.
    """
    kept = config
    for refusal in REFUSALS:
        value = value_at(kept, refusal.key)
        if value is None or (refusal.when and not refusal.when(config, world_size)):
            continue
        if not _requests_nothing(value, refusal.default):
            instead = f" and use {' '.join(refusal.instead)}" if refusal.instead else ""
            message = f"{_where(refusal.key, place_of)} is refused: {refusal.reason}"
            problems.append(UserError(message, f"set ds.{refusal.key}=null{instead}"))
        kept = without(kept, refusal.key)
    for idle in IDLE:
        value = value_at(kept, idle.key)
        if value is None:
            continue
        if not _requests_nothing(value, idle.default):
            notes.append(f"{_where(idle.key, place_of)} has no effect: {idle.reason}")
        kept = without(kept, idle.key)
    notes.extend(_idle_here(kept, place_of))
    return kept


def _where(key: str, place_of: PlaceOf) -> str:
    return f"{place_of(tuple(key.split('.')))}{key}"


def _requests_nothing(value: Any, default: Any) -> bool:
    if isinstance(value, dict):
        if value.get("enabled") is False:
            return True
        defaults = default if isinstance(default, dict) else {}
        return all(_requests_nothing(inner, defaults.get(key)) for key, inner in value.items())
    if isinstance(value, list):
        return not value
    if isinstance(value, str) and isinstance(default, str):
        return value.lower() == default.lower()
    return value is False if default is None else bool(value == default)


def _idle_here(config: Tree, place_of: PlaceOf) -> Iterator[str]:
    """What DeepSpeed reads at another ZeRO stage, with another device, or with DeepCompile only."""
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        stage = zero.get("stage", 0)
        ours = STAGE_3 if stage == 3 else STAGES_1_AND_2 if stage in (1, 2) else ()
        keys = [key for key in zero if key in (*STAGE_3, *STAGES_1_AND_2) and key not in ours]
        if keys:
            yield f"{_listed(keys, 'zero_optimization', place_of)} no effect at ZeRO stage {stage}"
        for section, names in NVME.items():
            given = zero.get(section)
            if isinstance(given, dict) and given.get("device") != "nvme" and any(key in names for key in given):
                listed = _listed([key for key in given if key in names], f"zero_optimization.{section}", place_of)
                yield f"{listed} no effect without nvme"
    if config.get("aio") and "nvme" not in (value_at(config, f"zero_optimization.{name}.device") for name in NVME):
        yield f"{_where('aio', place_of)} has no effect without nvme"
    if config.get("log_level") not in ("info", "debug"):
        keys = [key for key in LOGGED if config.get(key) not in (None, False)]
        if keys:
            yield f"{_listed(keys, '', place_of)} no effect without log_level=info, which logs into log.txt"
    compiled = config.get("compile")
    if isinstance(compiled, dict) and not compiled.get("deepcompile"):
        keys = [".".join(path) for path, value in leaves(compiled) if value not in (False, {}) and path[0] != "passes"]
        if keys:
            yield f"{_listed(keys, 'compile', place_of)} no effect without compile.deepcompile"


def _listed(keys: list[str], section: str, place_of: PlaceOf) -> str:
    first = _where(f"{section}.{keys[0]}" if section else keys[0], place_of)
    return f"{', '.join([first, *keys[1:]])} {'has' if len(keys) == 1 else 'have'}"
