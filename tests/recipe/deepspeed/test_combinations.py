"""Combinations that DeepSpeed refuses late, or gets wrong, are refused before the run starts."""

from __future__ import annotations

import pytest

from tests.recipe.resolving import error_of, run_of, write


@pytest.mark.parametrize(
    ("ds", "override", "named", "remedy"),
    [
        ("zero0", "zero_optimization.offload_optimizer.device=cpu", "ZeRO stages 1, 2 and 3", "--ds "),
        ("zero2", "zero_optimization.offload_param.device=cpu", "ZeRO stage 3, not by stage 2", "--ds zero3_offload"),
        ("zero2_offload", "zero_optimization.offload_optimizer.device=nvme", "NVMe", "--ds "),
        ("zero2", "fp16.enabled=true", "bf16 and fp16", "ds.fp16.enabled=false"),
        ("zero0", "bf16.enabled=true", "bf16 and torch_autocast", "ds.torch_autocast.enabled=false"),
        ("zero0", "torch_autocast.dtype=null", "torch_autocast.dtype", "ds.torch_autocast.dtype=bfloat16"),
        ("zero2", "zero_optimization.stage=0", "data_types.grad_accum_dtype=fp32", "ds.data_types=null"),
        ("zero2", "gradient_allreduce_op=sum", "gradient_allreduce_op=sum", "ds.gradient_allreduce_op=mean"),
        ("zero3", "zero_optimization.zero_quantized_weights=true", "zero_quantized_weights", "weights=null"),
        ("zero3", "compile.deepcompile=true", "compile.deepcompile", "ds.compile.deepcompile=null"),
        ("zero3", "zero_optimization.stage3_module_granularity_threshold=9", "granularity_threshold", "threshold=null"),
        ("zero3", "zero_optimization.leaf_module.names=[encoder]", "leaf_module", "leaf_module=null"),
    ],
)
def test_combinations_that_deepspeed_refuses_late_or_gets_wrong(ds, override, named, remedy):
    error = error_of("t5_small", f"ds.{override}", ds=ds)
    assert named in error.message and remedy in error.hint


def test_fp16_is_refused_where_deepspeed_does_not_scale_the_loss(tmp_path):
    bart = ("t5_small", "model.backbone=bart_large")
    for stage in (0, 1):
        zero = {"zero_optimization": {"stage": stage}}
        path = write(tmp_path / f"half{stage}.json", {"fp16": {"enabled": True}, **zero})
        if stage:
            assert run_of(*bart, ds=path, has_gpu=True).precision == "fp16"
        else:
            error = error_of(*bart, ds=path, has_gpu=True)
            assert "fp16" in error.message and "--ds zero1" in error.hint
        autocast = {"torch_autocast": {"enabled": True, "dtype": "float16"}, **zero}
        error = error_of(*bart, ds=write(tmp_path / f"autocast{stage}.json", autocast), has_gpu=True)
        assert "torch_autocast.dtype=float16" in error.message and "--ds zero2_fp16" in error.hint
