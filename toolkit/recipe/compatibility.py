"""What goes with what, as data: rules that hold before a model or a process group exists."""

from __future__ import annotations

# Architectures (HuggingFace model_type) whose activations leave fp16's range and turn the loss into NaN.
OVERFLOWS_IN_FP16 = frozenset({"t5", "mt5", "umt5", "longt5"})

# DeepSpeed settings that only a GPU host can carry out: dotted key -> what it is.
GPU_ONLY = {
    "compile.deepcompile": "DeepCompile",
    "zero_optimization.zenflow": "ZenFlow",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload",
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ parameters kept whole on each node",
    "zero_optimization.zero_quantized_weights": "ZeRO++ quantised weights",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ quantised gradients",
    "zero_optimization.zero_quantized_nontrainable_weights": "ZeRO++ quantised weights",
}


def precision_refusal(architecture: str | None, precision: str) -> str | None:
    """Why a backbone cannot train in ``precision``, or None where it can.

    Args:
        architecture: HuggingFace ``model_type``; None = not known yet, to be asked again once the model is read.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    if precision == "fp16" and architecture in OVERFLOWS_IN_FP16:
        return (
            f"a {architecture} overflows to NaN in fp16; use bf16 (ds.fp16.enabled=false ds.bf16.enabled=true) or fp32"
        )
    return None
