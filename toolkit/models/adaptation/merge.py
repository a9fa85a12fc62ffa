"""Plain weights of a model with adapters or quantised layers: adapters are detached or merged, layers unpacked.

All of this changes a whole model in place, one layer at a time, in one process, after training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from toolkit.models.adaptation.adapter_files import is_adapter
from toolkit.models.adaptation.adapters import ADAPTER
from toolkit.models.adaptation.extra_tokens import merge_rows
from toolkit.models.adaptation.quantisation import is_packed
from toolkit.models.translator import PoseTranslator


@dataclass(frozen=True)
class Adapter:
    """Adapters without the model that they were trained in."""

    config: PeftConfig  # PEFT's description of them
    weights: dict[str, Tensor]  # by the names that they have in a model

    def to(self, place: torch.dtype | str) -> Adapter:
        """The same adapters with weights of another type, or on another device."""
        return Adapter(self.config, {name: tensor.to(place) for name, tensor in self.weights.items()})


def make_standalone(model: PoseTranslator) -> Adapter | None:
    """Make a model of plain weights, with new rows in their tables; returns its adapters, detached, if any.

    All of it is on the CPU afterwards: a GPU that holds packed weights need not hold plain ones.
    """
    adapter = detach_adapter(model)
    dtype = next(model.pose_encoder.parameters()).dtype  # of everything that is not quantised
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_packed(module.get_parameter("weight")):
            model.set_submodule(name, _unpacked(module, dtype))
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    model.to("cpu")
    merge_rows(model)
    model.base = None
    return adapter and adapter.to("cpu")


def attach_adapter(model: PoseTranslator, adapter: Adapter) -> None:
    """Attach adapters to a model of plain weights."""
    model.add_adapter(adapter.config, ADAPTER)
    parameters = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    assert parameters.keys() == adapter.weights.keys(), "the adapters belong to another model"
    for name, parameter in parameters.items():
        parameter.data.copy_(adapter.weights[name])
    model.train(model.training)  # PEFT switches its dropout on


def merge(model: PoseTranslator, adapter: Adapter) -> None:
    """Add the adapters to the weights of a model of plain weights, which then gives the same results without them."""
    attach_adapter(model, adapter)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    detach_adapter(model)


def detach_adapter(model: PoseTranslator) -> Adapter | None:
    """Remove the adapters from a model, and give them back."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is None:
        return None
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if is_adapter(name)}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return Adapter(config, weights)


def _unpacked(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(dequantize_module_weight(layer).detach().to("cpu", dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain
