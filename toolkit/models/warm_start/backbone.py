"""What of a backbone belongs to which part, and whether the parts of two backbones are alike."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from toolkit.models.backbone import decoder_config, encoder_config, encoder_width, halves, layer_list, stacks
from toolkit.models.backbone_config import DROPOUT_KEYS, LAYER_DROP_KEYS
from toolkit.recipe.sections.model import BACKBONE_PARTS, Part

# Settings that change no result of trained weights, or that names and shapes of weights show. Sizes of the vocabulary
# are the tokenizer's, dropout is the recipe's.
_FREE = {
    *DROPOUT_KEYS,
    *LAYER_DROP_KEYS,
    *("vocab_size", "decoder_vocab_size", "use_cache", "classifier_dropout", "classifier_dropout_rate", "num_labels"),
    *("num_layers", "num_decoder_layers", "num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"),
    *("initializer_factor", "initializer_range", "init_std", "max_length", "num_beams"),
}


def part_of_each(backbone: PreTrainedModel) -> dict[str, Part]:
    """The part that each stored tensor of a backbone belongs to, by name; tied ones have one part."""
    tensors = backbone.state_dict(keep_vars=True)
    tables = {id(tensor) for tensor in _tables(backbone).values()}
    half, _ = halves(backbone)
    encoder = {id(tensor) for tensor in half.state_dict(keep_vars=True).values()} if half else set()
    parts: dict[str, Part] = {}
    for name, tensor in tensors.items():
        of_tokens = id(tensor) in tables or name == "final_logits_bias"
        parts[name] = "embeddings" if of_tokens else "encoder" if id(tensor) in encoder else "decoder"
    return parts


def _tables(backbone: PreTrainedModel) -> dict[int, Tensor]:
    """Weights with a row for each token, and the output's bias, by identity."""
    modules: list[Any] = [backbone.get_output_embeddings(), backbone.get_input_embeddings()]
    for half in stacks(backbone):
        with contextlib.suppress(NotImplementedError):  # some halves do not give theirs
            modules.append(half.get_input_embeddings())
    return {
        id(tensor): tensor
        for module in modules
        if isinstance(module, nn.Module)
        for tensor in module.parameters(recurse=False)
    }


def token_dimension(tensor: Tensor, name: str) -> int:
    """Along which dimension a tensor of the embeddings counts tokens; BART's bias has them in its second one."""
    return 1 if name == "final_logits_bias" and tensor.dim() == 2 else 0


def difference(wanted: PreTrainedModel, known: PreTrainedModel, parts: list[Part]) -> str | None:
    """What keeps these parts of two backbones from being the same, in words; None where nothing does."""
    parts = [part for part in BACKBONE_PARTS if part in parts]
    if not parts:
        return None
    own, other = (part_of_each(model) for model in (wanted, known))
    tensors, known_tensors = (model.state_dict(keep_vars=True) for model in (wanted, known))
    sizes = f"{_in_words(known)} there, {_in_words(wanted)} in the recipe"
    for part in parts:
        names, others = ({name for name, its in each.items() if its == part} for each in (own, other))
        if names != others:
            return f"{sizes}: {min(names ^ others)} is in one of them"
        for name in sorted(names):
            shapes = [list(each[name].shape) for each in (tensors, known_tensors)]
            if part == "embeddings":
                for shape, each in zip(shapes, (tensors, known_tensors), strict=True):
                    del shape[token_dimension(each[name], name)]
            if shapes[0] != shapes[1]:
                return f"{sizes}: {name} is {tuple(known_tensors[name].shape)} and {tuple(tensors[name].shape)}"
    if "embeddings" in parts and _ties(tensors, own) != _ties(known_tensors, other):
        return f"{sizes}: token tables that are one matrix in one of them are several in the other"
    for part, get, other_half in (("encoder", encoder_config, "decoder"), ("decoder", decoder_config, "encoder")):
        without = "" if other_half in parts else other_half
        if part in parts and (changed := _changed(get(wanted.config), get(known.config), without)):
            return f"{sizes}: {changed}"
    return None


def _in_words(model: PreTrainedModel) -> str:
    layers = " + ".join(str(len(layer_list(half))) for half in stacks(model))
    return f"{model.config.model_type} of width {encoder_width(model.config)} with {layers} layers"


def _ties(tensors: dict[str, Tensor], parts: dict[str, Part]) -> set[frozenset[str]]:
    """The names that stand for one matrix."""
    names: dict[int, list[str]] = {}
    for name, part in parts.items():
        if part == "embeddings":
            names.setdefault(id(tensors[name]), []).append(name)
    return {frozenset(group) for group in names.values()}


def _changed(wanted: PreTrainedConfig, known: PreTrainedConfig, without: str) -> str | None:
    """A setting by which the same weights give other results; of both halves, or ``without`` one of them."""
    if wanted.model_type != known.model_type:
        return f"model_type {known.model_type} and {wanted.model_type}"
    keys = type(wanted)().to_dict().keys() - PreTrainedConfig().to_dict().keys() - _FREE
    values, others = wanted.to_dict(), known.to_dict()
    for key in sorted(key for key in keys if not key.endswith("_id") and not (without and without in key)):
        if values.get(key) != others.get(key):
            return f"{key} {others.get(key)} and {values.get(key)}"
    return None
