"""Which layers of a model have a quick form."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from toolkit.cpu.attention import use_quick_attention
from toolkit.cpu.dropout import use_quick_dropout
from toolkit.cpu.linear import use_fp32_linear
from toolkit.cpu.rms_norm import use_quick_rms_norm


def use_quick_layers(model: nn.Module) -> None:
    """Have dropout, attention, linear layers and T5's normalisation take their quick forms; weights and names stay."""
    use_quick_dropout(model)
    use_quick_rms_norm(model)
    use_fp32_linear(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            use_quick_attention(module)
