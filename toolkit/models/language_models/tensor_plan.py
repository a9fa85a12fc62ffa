"""Which weights of a language model are split over the ranks of a tensor-parallel group, for DeepSpeed's AutoTP.

transformers says it of each architecture (``base_model_tp_plan``): the first matrices of attention and feed-forward
network by their rows, which are heads and features, the second ones by their columns, whose products are summed over
the ranks. DeepSpeed reads that plan only of a model that is a language model itself, and not of one inside another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from toolkit.errors import UserError
from toolkit.models.language_models.prefixes import is_language_model

# transformers' styles -> DeepSpeed's. Norms of single heads see the heads of one rank, so their gradients are summed.
STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    "replicated_with_grad_allreduce": {"partition_type": "skip", "grad_allreduce": True},
}
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # what each rank gets an equal part of


def partition_plan(backbone: PreTrainedModel) -> dict[str, Any]:
    """The keys of DeepSpeed's ``tensor_parallel`` section for a translator with this backbone."""
    stem = re.escape(f"backbone.{backbone.base_model_prefix}.")
    specs = [
        {"patterns": [f"^{stem}{re.escape(name).replace(re.escape('*'), '[0-9]+')}[.]weight$"], **STYLES[style]}
        for name, style in _plan(backbone.config).items()
    ]
    return {"partition_config": {"use_default_specs": False, "layer_specs": specs}, "vocab_parallel_lm_head": False}


def split_weights(translator: nn.Module) -> list[nn.Parameter]:
    """The parameters of a whole translator that would be split; none where its backbone is no language model."""
    backbone: Any = translator.backbone
    if not is_language_model(backbone.config):
        return []
    layers, found = backbone.get_submodule(f"{backbone.base_model_prefix}.layers"), []
    for name, style in _plan(backbone.config).items():
        path = name.removeprefix("layers.*.")
        for layer in layers:
            module = layer.get_submodule(path)
            if style == "colwise":
                found += module.parameters(recurse=False)
            elif style == "rowwise":
                found.append(module.weight)  # its bias is added to the sum
    return found


def check_division(config: PreTrainedConfig, size: int, backbone: str) -> None:
    """Raise UserError where a language model cannot be split into ``size`` equal parts."""
    if size == 1:
        return
    where = f"tensor_parallel.autotp_size={size}"
    unknown = sorted(set(_plan(config).values()) - STYLES.keys())
    if unknown or not _plan(config) or not is_language_model(config):
        what = f"is split in unknown ways ({', '.join(unknown)})" if unknown else "is not split into parts"
        raise UserError(
            f"{where}: model.backbone={backbone}, a {config.model_type}, {what}",
            "use --ds zero3 and ds.tensor_parallel=null",
        )
    if uneven := [f"{key}={value}" for key, value in _sizes(config) if value % size]:
        raise UserError(
            f"{where} does not divide the layers of model.backbone={backbone} ({', '.join(uneven)})",
            "set a divisor of them, or use --ds zero3 and ds.tensor_parallel=null",
        )


def _plan(config: PreTrainedConfig) -> dict[str, str]:
    """What is split in the layers; token table and output matrix stay whole."""
    plan = config.base_model_tp_plan or {}
    return {name: style for name, style in plan.items() if name.startswith("layers.")}


def _sizes(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    for key in DIVIDED:
        yield key, int(getattr(config, key))
