"""Which layers of a model have an implementation for the CPU."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from toolkit.cpu.attention import use_cpu_attention
from toolkit.cpu.dropout import use_cpu_dropout
from toolkit.cpu.linear import use_fp32_linear
from toolkit.cpu.rms_norm import use_cpu_rms_norm


def use_cpu_layers(model: nn.Module) -> None:
    """Have dropout, attention, linear layers and T5's normalisation run their CPU code; weights and names stay."""
    use_cpu_dropout(model)
    use_cpu_rms_norm(model)
    use_fp32_linear(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            use_cpu_attention(module)
