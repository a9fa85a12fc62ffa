"""Linear layers in 8 or 4 bits, by bitsandbytes, on GPU and CPU: a frozen backbone that an adapter trains on top of.

Packed are the backbone's linear layers. Embeddings, output projection, pose encoder and CTC head stay whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.dtypes import TORCH_DTYPES

if TYPE_CHECKING:  # the search imports this file, and translate.py starts without pydantic
    from toolkit.recipe.sections.model import Quantization

# Columns of activations beyond this are computed in 16 bits, as LLM.int8() has it (Dettmers et al. 2022, section 3.2).
OUTLIER_THRESHOLD = 6.0


def packable(backbone: PreTrainedModel, quantization: Quantization) -> set[str]:
    """The names of the backbone's linear layers that are to be packed: all but the output projection.

    Some architectures name layers whose products leave fp16's range (T5's ``wo``). transformers never packs those; here
    they stay whole where packed layers compute in fp16, which int8 always does, and NF4 only if asked to.
    """
    in_fp16 = quantization.kind == "int8" or quantization.compute_dtype == "fp16"
    whole = set(backbone._keep_in_fp32_modules or ()) if in_fp16 else set()
    output = backbone.get_output_embeddings()
    return {
        name
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear and module is not output and not whole & set(name.split("."))
    }


def quantised(linear: nn.Linear, quantization: Quantization, storage: torch.dtype) -> nn.Linear:
    """A linear layer whose weight is packed, where that weight is; it is frozen.

    Four-bit numbers are stored in the dtype ``storage``, which must be that of the run's other parameters: DeepSpeed
    casts parameters of another floating type, ZeRO gathers those of one type together, and a T5 casts activations to
    the type of its weights. ``linear`` is of no use afterwards.
    """
    import bitsandbytes

    device = linear.weight.device
    shape: tuple[Any, ...] = (linear.in_features, linear.out_features, linear.bias is not None)
    if quantization.kind == "int8":
        packed = bitsandbytes.nn.Linear8bitLt(
            *shape, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
        # It quantises weights on their way from the CPU.
        weight = bitsandbytes.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        packed = bitsandbytes.nn.Linear4bit(
            *shape, TORCH_DTYPES[quantization.compute_dtype], quant_type="nf4", quant_storage=storage, device="meta"
        )
        # In evaluation on a CPU it would change the weight's layout in place, which training and ZeRO do not expect.
        packed.support_avx512bf16_for_cpu = False
        weight = bitsandbytes.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=quantization.double_quantization,
            quant_type="nf4",
            quant_storage=storage,
            module=packed,
        )
    packed.weight = weight.to(device)
    packed.bias = linear.bias
    del linear.weight  # frees its memory, also where the layer is still referenced
    packed.requires_grad_(False)
    packed._is_hf_initialized = True  # transformers would draw random numbers into it
    return packed


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether a parameter is quantised, so that its type and shape are not those of its numbers."""
    return hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")


def mark_quantised(model: PreTrainedModel, quantization: Quantization) -> None:
    """Mark the model as quantised, by which PEFT chooses its layers."""
    model.is_loaded_in_4bit = quantization.kind == "nf4"
    model.is_loaded_in_8bit = quantization.kind == "int8"
