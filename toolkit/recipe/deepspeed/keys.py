"""The keys of a DeepSpeed JSON as data: which there are, their types, and who owns their values.

DeepSpeed ignores a misspelt key at the top level, and importing it takes seconds, so the names are written here; a test
compares this table, and that of ``refusals.py``, with the installed DeepSpeed. A leaf is a type name
(``int float bool str list dict any``) or the tuple of its allowed values; a dictionary is a section.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

DEVICES = ("none", "cpu", "nvme")
DTYPES = ("fp32", "bf16", "fp16")

OFFLOAD_OPTIMIZER = {
    "device": DEVICES,
    "nvme_path": "str",
    "buffer_count": "int",
    "pin_memory": "bool",
    "pipeline_read": "bool",
    "pipeline_write": "bool",
    "fast_init": "bool",
    "ratio": "float",
    "super_offload": "bool",
    "cpuadam_cores_perc": "float",
}
OFFLOAD_PARAM = {
    "device": DEVICES,
    "nvme_path": "str",
    "buffer_count": "int",
    "buffer_size": "int",
    "max_in_cpu": "int",
    "pin_memory": "bool",
}
ZENFLOW = {
    "topk_ratio": "float",
    "select_strategy": ("auto", "step", "epoch"),
    "select_interval": "any",  # "auto" or a number of steps
    "update_interval": "any",  # "auto" or a number of steps
    "overlap_step": "bool",
    "offload": "bool",
    "auto_ratio": "float",
    "full_warm_up_rounds": "int",
    "pt_reserved_cores_perc": "float",
    "steps_per_epoch": "int",
}
ZERO_OPTIMIZATION = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "int",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "int",
    "overlap_comm": "bool",
    "compute_grad_norm": "bool",
    "load_from_fp32_weights": "bool",
    "elastic_checkpoint": "bool",
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": ZENFLOW,
    "sub_group_size": "int",
    "cpu_offload_param": "bool",
    "cpu_offload_use_pin_memory": "bool",
    "cpu_offload": "bool",
    "stage3_prefetch_bucket_size": "int",
    "stage3_param_persistence_threshold": "int",
    "stage3_model_persistence_threshold": "int",
    "stage3_max_live_parameters": "int",
    "stage3_max_reuse_distance": "int",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_module_granularity_threshold": "int",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "stage3_allgather_sequential": "bool",
    "stage3_gather_fp16_weights_on_model_save": "bool",
    "ignore_unused_parameters": "bool",
    "legacy_stage1": "bool",
    "round_robin_gradients": "bool",
    "parameter_alignment": "bool",
    "zero_hpz_partition_size": "int",
    "zero_quantized_weights": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_gradients": "bool",
    "memory_efficient_linear": "bool",
    "pipeline_loading_checkpoint": "bool",
    "override_module_apply": "bool",
    "log_trace_cache_warnings": "bool",
    "enable_sanity_checks": "bool",
    "save_muon_momentum_buffer_in_memory": "bool",
    "leaf_module": {"classes": "list", "names": "list", "name_suffixes": "list"},
}
BF16 = {
    "enabled": "bool",
    "immediate_grad_update": "bool",
    "check_grad_overflow": "bool",
    "bf16_master_weights_and_grads": "bool",
    "bf16_optimizer_states": "bool",
}
FP16 = {
    "enabled": "bool",
    "auto_cast": "bool",
    "loss_scale": "float",
    "initial_scale_power": "int",
    "loss_scale_window": "int",
    "hysteresis": "int",
    "consecutive_hysteresis": "bool",
    "min_loss_scale": "int",
    "fp16_master_weights_and_grads": "bool",
}
COMPILE = {
    "deepcompile": "bool",
    "autoep_non_moe": "bool",
    "free_activation": "bool",
    "free_activation_threshold": "int",
    "offload_activation": "bool",
    "offload_activation_pin_memory": "bool",
    "offload_opt_states": "bool",
    "double_buffer": "bool",
    "symmetric_memory": "bool",
    "debug_log": "bool",
    "offload_parameters": "bool",
    "sync_before_reduce": "bool",
    "sync_after_reduce": "bool",
    "sync_before_allgather": "bool",
    "sync_after_allgather": "bool",
    "keep_int_input_tensors": "bool",
    "keep_all_input_tensors": "bool",
    "passes": "list",
}
COMMS_LOGGER = {"enabled": "bool", "prof_all": "bool", "prof_ops": "list", "verbose": "bool", "debug": "bool"}
CHECKPOINT = {
    "tag_validation": "str",
    "load_universal": "bool",
    "use_node_local_storage": "bool",
    "parallel_write": {"pipeline_stage": "bool"},
    "checkpoint_serialization": "bool",
    "writer": "dict",
}
DATA_TYPES = {
    "grad_accum_dtype": DTYPES,
    "param_dtype": DTYPES,
    "buffer_dtype": DTYPES,
    "keep_in_fp32_modules": "any",  # "auto" or a list of name patterns
}
AIO = {
    "block_size": "int",
    "queue_depth": "int",
    "intra_op_parallelism": "int",
    "single_submit": "bool",
    "overlap_events": "bool",
    "use_gds": "bool",
}
RENAMED = {"aio.thread_count": "aio.intra_op_parallelism"}  # keys that DeepSpeed no longer reads -> of today
FLOPS_PROFILER = {
    "enabled": "bool",
    "recompute_fwd_factor": "float",
    "profile_step": "int",
    "module_depth": "int",
    "top_modules": "int",
    "detailed": "bool",
    "output_file": "str",
}

TENSOR_PARALLEL = {
    "autotp_size": "int",
    "dtype": "str",
    "tp_overlap_comm": "bool",
    "vocab_parallel_lm_head": "bool",
    "vocab_parallel_ce_backend": "str",
    "tp": "dict",
    "tensor_parallel": "dict",
    "injection_policy_tuple": "any",
    "partition_config": "dict",
    "preset_model": "str",
    "keep_module_on_host": "bool",
    "kernel_inject": "bool",
    "replace_with_kernel_inject": "bool",
}

KNOWN: dict[str, Any] = {
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "gradient_accumulation_steps": "int",
    "gradient_clipping": "float",
    "optimizer": {"type": "str", "params": "dict", "legacy_fusion": "bool"},
    "scheduler": "dict",
    "zero_optimization": ZERO_OPTIMIZATION,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "torch_autocast": {"enabled": "bool", "dtype": "str", "lower_precision_safe_modules": "list"},
    "data_types": DATA_TYPES,
    "communication_data_type": DTYPES,
    "seq_parallel_communication_data_type": DTYPES,
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "float",
    "gradient_allreduce_op": "str",
    "disable_allgather": "bool",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "checkpoint": CHECKPOINT,
    "datastates_ckpt": "dict",
    "aio": AIO,
    "compile": COMPILE,
    "comms_logger": COMMS_LOGGER,
    "flops_profiler": FLOPS_PROFILER,
    "timers": {"throughput": {"enabled": "bool", "synchronized": "bool"}},
    "tensorboard": {"enabled": "bool", "output_path": "str", "job_name": "str"},
    "wandb": {"enabled": "bool", "group": "str", "team": "str", "project": "str"},
    "csv_monitor": {"enabled": "bool", "output_path": "str", "job_name": "str"},
    "comet": "dict",
    "steps_per_print": "int",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "disable_python_gc": "bool",
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "tensor_parallel": TENSOR_PARALLEL,
    "weight_quantization": "dict",
    "vocabulary_size": "int",
}


def text_keys(known: dict[str, Any] = KNOWN, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key whose value is any text."""
    for name, kind in known.items():
        if isinstance(kind, dict):
            yield from text_keys(kind, (*path, name))
        elif kind == "str":
            yield (*path, name)


# Keys whose values the recipe owns, and the recipe key that owns each: a value is a conflict, "auto" is replaced.
OWNED: dict[str, str] = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer.type": "training.optimizer",
    "optimizer.params.lr": "training.learning_rate",
    "optimizer.params.betas": "training.betas",
    "optimizer.params.eps": "training.eps",
    "optimizer.params.weight_decay": "training.weight_decay",
    "scheduler": "training.schedule and training.warmup_ratio",
}

# How AdamW is carried out is placement, which the JSON may choose.
OPTIMIZER_IMPLEMENTATION: dict[str, Any] = {
    "torch_adam": "bool",
    "fused": "bool",
    "foreach": "bool",
    "fp32_optimizer_states": "bool",
    "adam_w_mode": "bool",
    "amsgrad": "bool",
    "bias_correction": "bool",
}

# "auto" is one of DeepSpeed's own values for these keys; it drops any other key that is "auto", without a message.
AUTO_ALLOWED = {
    "data_types.keep_in_fp32_modules",
    "zero_optimization.zenflow.select_strategy",
    "zero_optimization.zenflow.select_interval",
    "zero_optimization.zenflow.update_interval",
}
