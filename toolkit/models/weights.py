"""Whole weights out of a model that ZeRO may have cut into pieces, and a model folder written in one stroke."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit.models.extra_tokens import fold_rows
from toolkit.models.processor import PoseProcessor
from toolkit.models.trained import save_trained
from toolkit.models.translator import PoseTranslator


def whole_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Every weight of ``module`` on the CPU, whatever the ZeRO stage.

    All ranks must call this: at stage 3 each weight is gathered from all of them, one at a time, so that no rank ever
    holds two.

    Args:
        module: the model, as DeepSpeed holds it.
        keep: whether this rank wants the result; the others get an empty dict.
    """
    return _gathered(module.state_dict(keep_vars=True).items(), keep=keep)


def trainable_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The weights that train, by their names in the state dict; frozen ones, cut or packed, are not touched.

    Args and ranks as for :func:`whole_state_dict`.
    """
    return _gathered([item for item in module.named_parameters() if item[1].requires_grad], keep=keep)


def saved_state_dict(model: PoseTranslator, *, keep: bool) -> dict[str, Tensor]:
    """The weights that :func:`save_model` writes: all of them, or those that train where the rest is known.

    Args and ranks as for :func:`whole_state_dict`.
    """
    return trainable_state_dict(model, keep=keep) if model.base else whole_state_dict(model, keep=keep)


def _gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, tensor in tensors:
        partitioned = [tensor] if hasattr(tensor, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned):
            if keep:
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def count_weights(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers these parameters hold, also where they are packed into few bits or cut over ranks."""
    return sum(math.prod(_whole_shape(parameter)) for parameter in parameters)


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes' four bits
    return packed.shape if packed is not None else getattr(parameter, "ds_shape", parameter.shape)


def save_model(folder: Path, model: PoseTranslator, processor: PoseProcessor, weights: dict[str, Tensor]) -> None:
    """Write a HuggingFace folder; until it is complete it has another name, and then it takes the old one's place.

    Args:
        folder: where the model will be.
        model: gives configuration and generation settings.
        processor: goes beside it.
        weights: as :func:`saved_state_dict` gives them.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if model.base:
        partial.mkdir()
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        model.base.save(partial)
        save_trained(partial, model, weights)
    else:
        fold_rows(model, weights)
        model.save_pretrained(partial, state_dict=weights)
    processor.save_pretrained(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def device_of(module: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(module.parameters()).device
