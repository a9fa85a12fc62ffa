"""docs/internals.md lists what the toolkit changes at run time and each private name of a library that it leans on."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
# File of an installed library -> names that it must hold. An upgrade that drops one breaks what the page says of it.
NAMES = {
    "torch/nn/modules/dropout.py": ["Dropout"],
    "torch/nn/modules/linear.py": ["Linear"],
    "torch/nn/modules/module.py": [
        "register_forward_hook",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_non_persistent_buffers_set",
        "_parameters",
    ],
    "torch/_C/_VariableFunctions.pyi": [
        "_softmax_backward_data",
        "native_dropout",
        "_foreach_add_",
        "_foreach_copy_",
        "_foreach_mul_",
        "_foreach_zero_",
    ],
    "torch/nn/functional.py": ["scaled_dot_product_attention"],
    "torch/_meta_registrations.py": ["_scaled_dot_product_efficient_attention"],
    "peft/tuners/lora/layer.py": ["base_layer", "lora_variant", "active_adapters", "disable_adapters"],
    "torch/_C/__init__.pyi": ["_base", "_C", "_cdata", "_cuda_endAllocateToPool", "_cuda_releasePool"],
    "torch/distributed/distributed_c10d.py": ["_get_default_store"],
    "torch/_dynamo/config.py": ["recompile_limit", "specialize_float"],
    "torch/_dynamo/callback.py": ["callback_handler"],
    "torch/_dynamo/exc.py": ["TorchDynamoException", "FailOnRecompileLimitHit"],
    "torch/_functorch/config.py": ["force_non_lazy_backward_lowering"],
    "torch/fx/experimental/_config.py": ["use_duck_shape"],
    "torch/testing/_internal/distributed/fake_pg.py": ["FakeStore"],
    "transformers/models/t5/modeling_t5.py": ["variance_epsilon", "compute_bias"],
    "transformers/configuration_utils.py": ["_attn_implementation", "base_model_tp_plan"],
    "transformers/generation/utils.py": ["_pad_token_tensor", "_eos_token_tensor"],
    "transformers/initialization.py": ["no_tie_weights", "normal_"],
    "transformers/modeling_layers.py": ["_gradient_checkpointing_func", "forward_with_checkpointing"],
    "transformers/modeling_utils.py": [
        "_from_config",
        "_init_weights",
        "_tied_weights_keys",
        "_keep_in_fp32_modules",
        "_keys_to_ignore_on_load_unexpected",
        "_is_hf_initialized",
    ],
    "transformers/integrations/peft.py": ["_hf_peft_config_loaded"],
    "deepspeed/runtime/engine.py": [
        "buffered_allreduce_fallback",
        "enable_backward_allreduce",
        "is_deepcompile_active",
        "coalesce_grad_reduction",
        "allreduce_gradients",
        "_flush_coalesced_reduction_zero12",
    ],
    "deepspeed/runtime/base_optimizer.py": [
        "should_refresh_expected_hook_count",
        "_backward_active_depth",
        "get_param_comm_dtype",
    ],
    "deepspeed/runtime/bf16_optimizer.py": [
        "update_lp_params",
        "get_grads_for_reduction",
        "bf16_partitioned_groups",
        "fp32_groups_flat_partition",
        "bf16_groups",
        "fp32_groups_gradients",
        "fp32_groups_has_gradients",
        "fp32_groups_actual_gradients_flat",
        "update_hp_grads",
        "clear_hp_grads",
        "get_grads_for_norm",
        "immediate_grad_update",
        "_hp_grad",
    ],
    "deepspeed/runtime/fp16/fused_optimizer.py": ["fp16_groups", "fp32_groups_flat", "loss_scale_config"],
    "deepspeed/runtime/fp16/unfused_optimizer.py": ["fp16_groups", "fp32_groups"],
    "deepspeed/runtime/zero/stage_1_and_2.py": [
        "update_lp_params",
        "loss_scaler",
        "use_grad_accum_attribute",
        "gradient_accumulation_dtype",
        "grad_accum",
        "clear_backward_seen_flag",
        "_coalesce_grad_reduction",
        "averaged_gradients",
        "GradPartitionBufferGroup",
        "round_robin_bit16_groups",
        "round_robin_bit16_padding",
        "bit16_groups_flat",
        "params_in_partition",
        "master_weights_and_grads_dtype",
        "partition_size",
        "real_dp_process_group",
        "_release_ipg_buffers",
    ],
    "deepspeed/runtime/zero/stage3.py": [
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "get_param_id",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
        "_reassign_or_swap_out_partitioned_parameters",
        "_release_swap_buffers",
    ],
    "deepspeed/runtime/zero/partition_parameters.py": [
        "ds_id",
        "ds_shape",
        "ds_numel",
        "ds_tensor",
        "ds_zero_partition_rank",
    ],
    "deepspeed/utils/mixed_precision_linkage.py": ["_hp_mapping"],
    "deepspeed/utils/tensor_fragment.py": ["lp_fragment_address", "hp_fragment_address", "param_group_index"],
    "deepspeed/ops/adam/cpu_adam.py": ["ds_opt_adam", "adam_update", "opt_id", "fp32_optimizer_states"],
    "deepspeed/utils/groups.py": ["_init_tp_mesh_device"],
    "deepspeed/module_inject/layers.py": ["tensor_model_parallel", "partition_dim"],
    "deepspeed/checkpoint/constants.py": ["DS_AUTOTP_UC_META"],
    "sacrebleu/metrics/base.py": ["_extract_corpus_statistics", "_compute_score_from_stats"],
}
ALL = {name for names in NAMES.values() for name in names}
# What assigns to an object of a library: a class, a hook, a function of a module, a method of an instance.
CHANGES = re.compile(
    r"\.__class__ = |\.register_\w*forward\w*hook\(|setattr\(initialization, |Interface\.register\(|_params = "
)
PYTHONS = {"_exit", "_asdict", "_replace", "_fields"}


@cache
def sources() -> dict[Path, ast.Module]:
    paths = sorted((ROOT / "toolkit").rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@pytest.mark.parametrize("place", NAMES)
def test_the_installed_library_has_the_names(place: str) -> None:
    package, *_ = place.split("/")
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    text = (Path(found.origin).parents[1] / place).read_text(encoding="utf-8")
    missing = [name for name in NAMES[place] if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"{place} has no {missing}: see docs/internals.md for what leans on them"


def rows() -> dict[str, list[str]]:
    """Files of the page, and the names that each leans on, without the modules before them."""
    found = re.findall(r"^\| \[[^]]*\]\(\.\./([^)]+)\).*\| ([^|]+) \|$", PAGE, re.MULTILINE)
    return {path: [name.split(".")[-1] for name in re.findall(r"`([^`]+)`", names)] for path, names in found}


def test_the_page_has_each_name_and_each_file_uses_the_names_of_its_row() -> None:
    assert {name for names in rows().values() for name in names} == ALL
    unused = {
        path: missing
        for path, names in rows().items()
        if (missing := [name for name in names if name not in (ROOT / path).read_text(encoding="utf-8")])
    }
    assert unused == {}


def test_no_private_name_of_a_library_is_used_that_the_page_has_not() -> None:
    own = set(PYTHONS)
    used: dict[str, Path] = {}
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if is_own and isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                used[node.attr] = path
    assert {name: path.name for name, path in used.items() if name not in own | ALL} == {}


def test_every_file_that_changes_a_librarys_objects_is_on_the_page() -> None:
    changing = {
        path.relative_to(ROOT).as_posix() for path in sources() if CHANGES.search(path.read_text(encoding="utf-8"))
    }
    assert changing >= {"toolkit/cpu/dropout.py", "toolkit/cpu/communication.py"}
    assert {path for path in changing if f"(../{path})" not in PAGE} == set()


def test_the_drawing_of_the_rooms_is_up_to_date() -> None:
    """``python docs/rooms.py`` writes it."""
    assert load_script("docs/rooms.py").page() == PAGE
