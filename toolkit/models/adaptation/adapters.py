"""Which parameters of a translator train: low-rank adapters in the backbone, and what trains in full or is frozen.

The pose encoder and the CTC head start from random weights and always train in full. The backbone's weights may be
whole, partitioned by ZeRO-3, or quantised by bitsandbytes.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolkit.errors import UserError
from toolkit.models.backbone import halves
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.model_cards import card_of
from toolkit.recipe.sections.model import Lora, Model

# How the architectures call the queries and values of attention, which is what the LoRA paper adapts: T5 and its kin;
# BART, M2M100, Pegasus, Marian, LED's decoder and language models; BERT and LED's encoder; GPT-2 (all three in one, and
# its queries to the encoder).
QUERIES_AND_VALUES = frozenset({"q", "v", "q_proj", "v_proj", "query", "value", "c_attn", "q_attn"})
ALL_LINEAR = "all-linear"
ADAPTER = "default"  # PEFT's own name for the only adapter of a model
SEED_OFFSET = 1_000_003  # adapters draw from a stream of their own, not from the one that made the backbone


def adapt(model: PoseTranslator, settings: Model) -> None:
    """Add adapters to a translator and freeze parameters, as the recipe asks; raises as :func:`lora_targets`."""
    if settings.lora:
        add_lora(model, settings.lora, lora_targets(model.backbone, settings))
    elif settings.quantization:
        model.backbone.requires_grad_(False)
    for part in settings.freeze:
        for parameter in _part(model, part):
            parameter.requires_grad_(False)
    for _, parameter in unreached_parameters(model):
        parameter.requires_grad_(False)


def lora_targets(backbone: PreTrainedModel, settings: Model) -> list[str]:
    """Last parts of the names of the modules that get adapters: the recipe's, else the model card's, else looked up.

    Raises:
        UserError: one of the recipe's or the card's matches no layer, or one whose weight another module uses, too.
    """
    layers = dict(linear_layers(backbone))
    card = card_of(settings)
    wanted = (settings.lora and settings.lora.targets) or (card and card.lora_targets)
    if wanted == [ALL_LINEAR]:
        head = backbone.get_output_embeddings()
        targets = {_last(name) for name, layer in layers.items() if layer is not head}
    elif wanted:
        for target in wanted:
            if not any(_ends_in(name, target) for name in layers):
                raise _unknown_target(target, settings, layers)
        targets = set(wanted)
    else:
        targets = {_last(name) for name in layers} & QUERIES_AND_VALUES
    if not targets:
        raise UserError(
            f"model.lora: the names of queries and values in a {backbone.config.model_type} are not known",
            f"set model.lora.targets to some of {', '.join(sorted({_last(name) for name in layers})[:12])}",
        )
    _check_unshared(backbone, [name for name in layers if any(_ends_in(name, target) for target in targets)], settings)
    return sorted(targets)


def add_lora(model: PoseTranslator, lora: Lora, targets: Iterable[str]) -> None:
    """Add adapters to these layers of the backbone and freeze the rest of it, except what ``lora.train`` names.

    Random values come from the seed of torch's generator, not its state, so that all ranks draw the same ones.
    """
    from peft import LoraConfig  # slow: it imports bitsandbytes

    unreached = _unreached_modules(model)
    left_out = sorted({f"backbone.{name}" for name, layer in linear_layers(model.backbone) if layer in unreached})
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        # Names begin at the translator, whose pose encoder has layers that must not match.
        target_modules=rf"backbone\.(?:.*\.)?(?:{'|'.join(re.escape(target) for target in sorted(targets))})",
        exclude_modules=left_out or None,
    )
    with torch.random.fork_rng(devices=[]), _whole_weights(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT detects GPT-2's layout
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

    The encoder reads poses, not tokens: its word embeddings are not used, unless the decoder shares them or there is a
    prefix. Neither are a BERT's pooler and a Longformer's global attention.
    """
    unreached = _unreached_modules(model)
    return [
        (f"{name}.{own}" if name else own, parameter)
        for name, module in model.named_modules()
        if module in unreached
        for own, parameter in module.named_parameters(recurse=False)
    ]


def linear_layers(backbone: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every layer of the backbone that can have an adapter."""
    for name, module in backbone.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def token_tables(model: PoseTranslator) -> list[nn.Module]:
    """The modules that turn tokens into vectors and vectors into scores of tokens; tied ones share their weight."""
    backbone = model.backbone
    modules = [backbone.get_decoder().get_input_embeddings(), backbone.get_output_embeddings()]
    if model.config.longest_prefix:
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
    encoder, decoder = halves(backbone)
    half = encoder if part == "encoder" else decoder
    kept = {id(parameter) for parameter in tables}
    return [parameter for parameter in half.parameters() if id(parameter) not in kept] if half else []


def _unreached_modules(model: PoseTranslator) -> set[nn.Module]:
    (encoder, _), tables = halves(model.backbone), token_tables(model)
    if encoder is None:
        return set()  # a language model reads words in any case
    words = {encoder.get_input_embeddings(), model.backbone.get_input_embeddings()} - {None}
    idle = {module for module in words if all(module.weight is not table.weight for table in tables)}
    parts = [part for name, part in encoder.named_modules() if name.endswith(("pooler", "_global"))]
    return idle | {inner for part in parts for inner in part.modules()}


@contextlib.contextmanager
def _whole_weights(model: PoseTranslator) -> Iterator[None]:
    """Within it PEFT gathers weights that ZeRO-3 has partitioned, where it reads them (DoRA's magnitudes)."""
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


def _check_unshared(backbone: PreTrainedModel, targets: Iterable[str], settings: Model) -> None:
    """Refuse adapters of a weight that several modules use, as an output matrix that is tied to the embeddings.

    The adapter would belong to one of them, and merging it would change them all.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for target in targets:
        names = users[id(backbone.get_submodule(target).weight)]
        if len(names) > 1:
            others = ", ".join(name for name in names if name != target)
            raise UserError(
                f"{_key(settings)}: {target} shares its weight with {others}, so an adapter cannot belong to it alone",
                f"drop {_last(target)}; model.lora.train=[embeddings] trains a tied token table in full",
            )


def _unknown_target(target: str, settings: Model, layers: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(target, sorted({_last(name) for name in layers}), n=5, cutoff=0.0)
    return UserError(
        f"{_key(settings)}: no linear layer of the backbone is called {target!r}", f"the nearest are {', '.join(near)}"
    )


def _key(settings: Model) -> str:
    """Where the targets were named."""
    return "model.lora.targets" if settings.lora and settings.lora.targets else f"lora_targets of {settings.backbone}"
