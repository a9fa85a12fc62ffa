"""Whole weights out of a model that ZeRO may have partitioned, and back; writing a model folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch import distributed as dist

from toolkit.cluster.tensor_parallel import own_part, part_of, whole, whole_shape
from toolkit.errors import UserError, first_line
from toolkit.files import give_usual_modes
from toolkit.models.adaptation.adapter_files import save_trained, trainable_parameters, trained_weights
from toolkit.models.adaptation.extra_tokens import fold_rows, is_new_row, unfolded
from toolkit.models.processor import PoseProcessor
from toolkit.models.translator import PoseTranslator

START_OVER = "train from scratch with --new"


def whole_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Every weight of ``module`` on the CPU, whatever the ZeRO stage.

    All ranks must call this: at stage 3 each weight is gathered from all of them, one at a time, so that no rank ever
    holds two. Ranks that do not ``keep`` the result get an empty dict.
    """
    return _gathered(module.state_dict(keep_vars=True), keep=keep)


def trainable_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The weights that train, by their names in the state dict; frozen ones are not gathered.

    Args and ranks as for :func:`whole_state_dict`.
    """
    return _gathered(trainable_parameters(module), keep=keep)


def saved_state_dict(model: PoseTranslator, *, keep: bool) -> dict[str, Tensor]:
    """The weights that :func:`save_model` writes: all of them, or those that train where the rest is known.

    Args and ranks as for :func:`whole_state_dict`.
    """
    return trainable_state_dict(model, keep=keep) if model.base else whole_state_dict(model, keep=keep)


def _gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        partitioned = [tensor] if hasattr(tensor, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned):
            all_of_it = whole(tensor)
            if keep:
                weights[name] = all_of_it.to("cpu", copy=True)
    return weights


def count_weights(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers these parameters hold, also where they are quantised or partitioned."""
    return sum(math.prod(_whole_shape(parameter)) for parameter in parameters)


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes' four bits
    return packed.shape if packed is not None else getattr(parameter, "ds_shape", whole_shape(parameter))


def save_model(folder: Path, model: PoseTranslator, processor: PoseProcessor, weights: dict[str, Tensor]) -> None:
    """Write a HuggingFace folder under a temporary name, which replaces ``folder`` when it is complete."""
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
    give_usual_modes(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def load_weights(folder: Path, model: PoseTranslator) -> None:
    """Load the weights that :func:`save_model` wrote into the model that wrote them, at any ZeRO stage.

    All ranks must call this: rank 0 reads, the others receive, and none ever holds a second weight whole.

    Raises:
        UserError: the folder cannot be read, or holds other weights; all ranks raise it.
    """
    import deepspeed

    reads = dist.get_rank() == 0
    problem: list[UserError | None] = [None]
    if reads:
        try:
            read = saved_weights(folder, model)
        except UserError as error:
            problem = [error]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise problem[0]
    tensors: Mapping[str, Tensor]
    tensors = trainable_parameters(model) if model.base else model.state_dict(keep_vars=True)
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in tensors.items()}.values():
        is_partitioned = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor] if is_partitioned else [], modifier_rank=0):
            # Rank 0 reads a whole weight, of which AutoTP's ranks keep their parts.
            values = tensor.new_empty(whole_shape(tensor)) if part_of(tensor) else tensor.detach()
            if reads:
                values.copy_(read(name))
            if not is_partitioned:
                dist.broadcast(values.view(-1).view(torch.uint8), src=0)  # as bytes: backends lack some types
            if part_of(tensor):
                tensor.copy_(own_part(tensor, values))


def saved_weights(folder: Path, model: PoseTranslator) -> Callable[[str], Tensor]:
    """The weights in ``folder``, to be read tensor by tensor, by the names that they have in ``model``."""
    if model.base:
        return trained_weights(folder, model)
    try:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        places = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} cannot be read: {first_line(error)}", START_OVER) from error
    tensors = model.state_dict(keep_vars=True)
    # Tied weights are stored once.
    keys = {id(tensors[key]): key for key in places if key in tensors}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in keys and not is_new_row(name)]
    problems = {"missing": missing, "unexpected": sorted(places.keys() - tensors.keys())}
    listed = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
    if listed:
        raise UserError(f"{folder} does not hold the weights of this model ({listed})", START_OVER)

    def read(name: str) -> Tensor:
        key = keys[id(tensors[name])]
        return places[key].get_tensor(key)

    return unfolded(model, read)
