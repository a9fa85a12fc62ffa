"""Parameter groups, and the optimizers that DeepSpeed does not make from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolkit.models.translator import FRESH
from toolkit.recipe.optimizers import MADE_BY_DEEPSPEED
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.optimization.learning_rate_layers import Place, places

# Root mean square of an AdamW update. Muon's is scaled to it, so that both share one learning rate (Liu et al. 2025,
# "Muon is Scalable for LLM Training", arXiv:2502.16982).
ADAMW_UPDATE_RMS = 0.2

Group = dict[str, Any]


def parameter_groups(module: nn.Module, resolved: ResolvedRun) -> list[Group]:
    """Trainable parameters by learning rate and weight decay; no group is empty.

    The pose encoder has its own rate. The rate of a layer of the backbone is multiplied by ``training.layer_decay``
    once for each layer above it in its stack (Clark et al. 2020, "ELECTRA", arXiv:2003.10555, appendix A). Norms and
    biases do not decay.

    Returns:
        groups with ``params``, ``lr`` (the peak), ``weight_decay`` and ``name``, which is ``fresh`` or ``backbone``.
        With Muon ``use_muon`` says whether Muon or AdamW steps the group.
    """
    training = resolved.recipe.training
    where = places(module)
    groups: dict[tuple[str, float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ds_shape is the whole shape of a parameter that ZeRO-3 has partitioned.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        rate = training.learning_rate
        if name.startswith("pose_encoder."):
            rate = training.pose_encoder_learning_rate or rate
        elif name in where:
            rate *= training.layer_decay ** where[name].above
        use_muon = training.optimizer == "muon" and _is_hidden_matrix(where.get(name), shape)
        if use_muon:
            rate *= muon_rate(shape)
        part = "fresh" if name.startswith(FRESH) else "backbone"
        decay = training.weight_decay if len(shape) > 1 else 0.0
        groups.setdefault((part, rate, decay, use_muon), []).append(parameter)
    muon = training.optimizer == "muon"
    return [
        {"params": members, "lr": rate, "weight_decay": decay, "name": part, **({"use_muon": half} if muon else {})}
        for (part, rate, decay, half), members in groups.items()
    ]


def _is_hidden_matrix(place: Place | None, shape: tuple[int, ...]) -> bool:
    """Whether Muon may orthogonalise it: matrices between hidden states, not embeddings."""
    return place is not None and place.in_layer and not place.embedding and len(shape) == 2


def muon_rate(shape: tuple[int, ...]) -> float:
    """The factor on Muon's learning rate for a matrix that makes its update as large as AdamW's.

    An orthogonal update of shape [rows, columns] has entries of root mean square 1 / sqrt(max(rows, columns)), and
    DeepSpeed multiplies it by sqrt(rows / columns) where there are more rows.
    """
    rows, columns = shape
    return ADAMW_UPDATE_RMS * math.sqrt(max(rows, columns)) / max(1.0, math.sqrt(rows / columns))


def client_optimizer(resolved: ResolvedRun) -> Callable[[list[Group]], torch.optim.Optimizer] | None:
    """A function that makes the optimizer of the JSON's ``type`` from groups; None where DeepSpeed makes it."""
    section = resolved.deepspeed["optimizer"]
    kind, params = section["type"], section["params"]
    if kind in MADE_BY_DEEPSPEED:
        return None
    if kind == "Muon":
        return lambda groups: _muon(groups, params)
    return lambda groups: _of_bitsandbytes(kind, groups, params)


def _of_bitsandbytes(kind: str, groups: list[Group], params: dict[str, Any]) -> torch.optim.Optimizer:
    import bitsandbytes

    kinds = {"AdamW8bit": bitsandbytes.optim.AdamW8bit, "Lion": bitsandbytes.optim.Lion}
    return kinds[kind](groups, **params)


def _muon(groups: list[Group], params: dict[str, Any]) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not torch.cuda.is_available():
        # DeepSpeed compiles the update for every shape, which takes a C++ compiler minutes.
        torch.compiler.set_stance("force_eager")
    ready = []
    for group in groups:
        for parameter in group["params"]:
            # DeepSpeed sets this for every matrix without "embed" in its name; T5 calls its embeddings "shared".
            parameter.use_muon = group["use_muon"]
        own = ("momentum",) if group["use_muon"] else ("betas", "eps")
        ready.append({**group, **{key: params[key] for key in own}})
    return MuonWithAuxAdam(ready, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})
