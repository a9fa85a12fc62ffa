"""What of a translator trains: low-rank adapters in the backbone, frozen parts, and what stays whole.

The pose encoder and the CTC head start from random weights and always train in full. This module knows nothing of how
the weights came here: they may lie whole, cut over ranks by ZeRO-3, or quantised by bitsandbytes.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.errors import UserError
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.model_cards import card_of
from toolkit.recipe.schema import Lora, Model

# How the architectures call the queries and values of attention, which is what the LoRA paper adapts: T5 and its kin;
# BART, M2M100, Pegasus, Marian and LED's decoder; BERT and LED's encoder; GPT-2 (all three in one, and its queries to
# the encoder).
QUERIES_AND_VALUES = frozenset({"q", "v", "q_proj", "v_proj", "query", "value", "c_attn", "q_attn"})
ALL_LINEAR = "all-linear"
ADAPTER = "default"  # PEFT's own name for the only adapter of a model
SEED_OFFSET = 1_000_003  # adapters draw from a stream of their own, not from the one that made the backbone


def adapt(model: PoseTranslator, settings: Model) -> None:
    """Put the adapters in and say what trains, as the recipe asks. Changes ``model``.

    Args:
        model: the whole translator; what it has of extra tokens (``extra_tokens.py``) is there already.
        settings: the recipe's ``model`` section.

    Raises:
        UserError: LoRA targets that match nothing; the nearest names are listed.
    """
    if settings.lora:
        add_lora(model, settings.lora, lora_targets(model, settings))
    elif settings.quantization:
        model.backbone.requires_grad_(False)
    for part in settings.freeze:
        for parameter in _part(model, part):
            parameter.requires_grad_(False)
    for _, parameter in unreached_parameters(model):
        parameter.requires_grad_(False)


def lora_targets(model: PoseTranslator, settings: Model) -> list[str]:
    """Last parts of the names of the modules that get adapters: the recipe's, else the model card's, else looked up.

    Raises:
        UserError: one of the recipe's or the card's matches nothing.
    """
    layers = dict(linear_layers(model))
    card = card_of(settings)
    wanted = (settings.lora and settings.lora.targets) or (card and card.lora_targets)
    if wanted == [ALL_LINEAR]:
        head = model.backbone.get_output_embeddings()
        return sorted({_last(name) for name, layer in layers.items() if layer is not head})
    if wanted:
        for target in wanted:
            if not any(_ends_in(name, target) for name in layers):
                raise UserError(_no_target(target, settings, layers))
        return sorted(set(wanted))
    found = sorted({_last(name) for name in layers} & QUERIES_AND_VALUES)
    if not found:
        raise UserError(
            f"model.lora: it is not known where a {model.backbone.config.model_type} has its queries and values: "
            f"name its layers in model.lora.targets, of {', '.join(sorted({_last(name) for name in layers})[:12])}"
        )
    return found


def add_lora(model: PoseTranslator, lora: Lora, targets: Iterable[str]) -> None:
    """Adapters in these layers of the backbone; everything else there is frozen but what ``lora.train`` names.

    The adapters start from the seed of torch's generator, wherever that stands: the same on every rank.
    """
    from peft import LoraConfig  # it brings bitsandbytes along, which takes its time

    unreached = _unreached_modules(model)
    left_out = sorted({name for name, layer in linear_layers(model) if layer in unreached})
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        # From the outer model: the pose encoder has layers of its own that must not match.
        target_modules=rf"backbone\.(?:.*\.)?(?:{'|'.join(re.escape(target) for target in sorted(targets))})",
        exclude_modules=left_out or None,
    )
    with torch.random.fork_rng(devices=[]), _whole_weights(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT sees GPT-2's layout by itself
        torch.manual_seed(torch.initial_seed() + SEED_OFFSET)
        model.add_adapter(config, ADAPTER)
    for name, module in model.named_children():
        if name != "backbone":
            module.requires_grad_(True)
    for part in lora.train:
        for parameter in _part(model, part):
            parameter.requires_grad_(True)


def unreached_parameters(model: PoseTranslator) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the backbone that no forward pass of a translator uses, and that so never have a gradient.

    The encoder reads poses, not tokens: its own word embeddings lie idle, unless the decoder shares them or a prefix is
    read by them. A BERT's pooler and a Longformer's global attention are not used either.
    """
    unreached = _unreached_modules(model)
    return [
        (f"{name}.{own}" if name else own, parameter)
        for name, module in model.named_modules()
        if module in unreached
        for own, parameter in module.named_parameters(recurse=False)
    ]


def linear_layers(model: PoseTranslator) -> Iterator[tuple[str, nn.Module]]:
    """Name (from the outer model) and module of every layer of the backbone that can have an adapter."""
    for name, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def token_tables(model: PoseTranslator) -> list[nn.Module]:
    """The modules that turn tokens into vectors and vectors into scores of tokens; tied ones share their weight."""
    backbone = model.backbone
    modules = [backbone.get_decoder().get_input_embeddings(), backbone.get_output_embeddings()]
    if model.config.prefix_token_ids:
        modules.append(model.get_input_embeddings())
    return list(dict.fromkeys(modules))


def _part(model: PoseTranslator, part: str) -> list[nn.Parameter]:
    """Parameters of a part of the backbone that a recipe can name."""
    backbone = model.backbone
    tables = [parameter for module in token_tables(model) for parameter in module.parameters()]
    if part == "embeddings":
        return tables
    if part == "layer_norms":
        norms = [module for module in backbone.modules() if type(module).__name__.endswith("Norm")]
        return [parameter for module in norms for parameter in module.parameters()]
    half = backbone.get_encoder() if part == "encoder" else backbone.get_decoder()
    kept = {id(parameter) for parameter in tables}
    return [parameter for parameter in half.parameters() if id(parameter) not in kept]


def _unreached_modules(model: PoseTranslator) -> set[nn.Module]:
    encoder, tables = model.backbone.get_encoder(), token_tables(model)
    words = {encoder.get_input_embeddings(), model.backbone.get_input_embeddings()} - {None}
    idle = {module for module in words if all(module.weight is not table.weight for table in tables)}
    parts = [part for name, part in encoder.named_modules() if name.endswith(("pooler", "_global"))]
    return idle | {inner for part in parts for inner in part.modules()}


@contextlib.contextmanager
def _whole_weights(model: PoseTranslator) -> Iterator[None]:
    """Within it PEFT gathers what ZeRO-3 has cut, where it must see a weight (DoRA's magnitudes)."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # known to transformers for as long as it lives
    yield
    del config


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _no_target(target: str, settings: Model, layers: Iterable[str]) -> str:
    known = sorted({_last(name) for name in layers})
    near = difflib.get_close_matches(target, known, n=5, cutoff=0.0)
    where = "model.lora.targets" if settings.lora and settings.lora.targets else f"lora_targets of {settings.backbone}"
    return f"{where}: no linear layer of the backbone is called {target!r}; the nearest: {', '.join(near)}"
