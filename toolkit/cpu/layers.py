"""Which layers of a model have an implementation for the CPU."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from toolkit.cpu.attention import use_cpu_attention
from toolkit.cpu.dropout import use_cpu_dropout
from toolkit.cpu.linear import use_fp32_linear
from toolkit.cpu.rms_norm import use_cpu_rms_norm


def use_cpu_layers(model: nn.Module, *, linear: bool = True) -> None:
    """Have dropout, attention, T5's normalisation and, with ``linear``, linear layers run their CPU code.

    Weights and names stay.
    """
    use_cpu_dropout(model)
    use_cpu_rms_norm(model)
    if linear:
        use_fp32_linear(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            use_cpu_attention(module)
