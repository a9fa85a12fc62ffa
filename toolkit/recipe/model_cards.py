"""Model cards: one YAML per backbone with its published dimensions, and a small version of each architecture.

With a card a backbone can be built from scratch, counted and planned without the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolkit.errors import UserError
from toolkit.files import read_text
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS
from toolkit.recipe.paths import models_dir, shown
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import BACKBONE_PARTS, Model
from toolkit.recipe.tree import did_you_mean
from toolkit.recipe.yaml_text import parse_yaml


class ModelCard(BaseModel):
    """One backbone: where it comes from, what it is, and how large."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    hub_id: str | None = None  # None = exists only from scratch
    architecture: str  # HuggingFace model_type
    config: dict[str, Any]  # HuggingFace configuration values, as published
    tokenizer: str  # hub id, or "bytes"
    parameters: int = Field(gt=0)  # of the backbone, without the pose encoder
    license: str
    lora_targets: list[str] | None = None  # last parts of module names; None = attention's queries and values
    language: str | None = None  # code that a multilingual tokenizer begins texts with, unless the recipe says another
    notes: str = ""


def model_names() -> list[str]:
    """The shipped model cards."""
    return sorted(path.stem for path in models_dir().glob("*.yaml"))


def load_model_yaml(name: str) -> ModelCard:
    """The model card of that name.

    Raises:
        UserError: there is none, or it is not a valid card.
    """
    path = models_dir() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"model card {name!r} does not exist",
            did_you_mean(name, model_names(), f"choose one of {', '.join(model_names())}"),
        )
    tree, lines = parse_yaml(read_text(path, "a model card"), shown(path))
    if not isinstance(tree, dict):
        raise UserError(
            f"{shown(path)}: not a mapping of keys to values", "write keys and values, as recipes/models/t5_small.yaml"
        )
    try:
        return ModelCard.model_validate({"name": name, **tree})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        place = f"{shown(path)} line {lines[(key,)]}" if (key,) in lines else shown(path)
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, ModelCard.model_fields, "take it out")
        else:
            hint = f"write {key} as recipes/models/t5_small.yaml does"
        raise UserError(f"{place}: {key}: {first['msg']}", hint) from error


def card_of(model: Model) -> ModelCard | None:
    """The card that ``model.backbone`` names, or None for a hub id or a folder.

    Raises:
        UserError: the backbone is neither a card's name nor a hub id nor a folder.
    """
    if model.backbone in model_names():
        return load_model_yaml(model.backbone)
    if "/" in model.backbone or Path(model.backbone).is_dir():
        return None
    otherwise = (
        f"choose one of {', '.join(model_names())}, a hub id such as google-t5/t5-small, or a folder that exists"
    )
    raise UserError(
        f"model.backbone={model.backbone}: no such model card", did_you_mean(model.backbone, model_names(), otherwise)
    )


def card_published_as(hub_id: str) -> str | None:
    """The name of the card of that hub id; None where there is none."""
    if "/" not in hub_id:  # a card's own name; every card would be read for nothing
        return None
    return next((name for name in model_names() if load_model_yaml(name).hub_id == hub_id), None)


def architecture_of(model: Model) -> str | None:
    """The backbone's HuggingFace ``model_type`` as far as it is known without a hub; None for a hub id."""
    card = card_of(model)
    if card:
        return card.architecture
    config = Path(model.backbone) / "config.json"
    if config.is_file():
        try:
            return str(json.loads(read_text(config, "a model configuration")).get("model_type")) or None
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(
                f"{config}: not a HuggingFace configuration: {error}",
                "save the model again by save_pretrained, or name another folder in model.backbone",
            ) from error
    return None


def is_language_model_known(model: Model) -> bool:
    """Whether the backbone is a language model as far as that is known without a hub: of a card, or in a folder."""
    published = card_published_as(model.backbone)
    architecture = load_model_yaml(published).architecture if published else architecture_of(model)
    return architecture in LANGUAGE_MODELS


def reads_published(model: Model) -> bool:
    """Whether a run reads the backbone's published weights: they are not random, and not all from ``init_from``."""
    takes_all = model.init_from is not None and set(BACKBONE_PARTS) <= set(model.init_parts)
    return not (model.from_scratch or model.tiny or takes_all)


def tokenizer_of(model: Model) -> str:
    """Which tokenizer a run uses: the recipe's; else the card's own; else the backbone's.

    A backbone with random weights needs no vocabulary from the hub, so its texts are bytes unless the recipe says more.
    """
    if model.tokenizer:
        return model.tokenizer
    card = card_of(model)
    if model.from_scratch or model.tiny:
        return "bytes"
    return card.tokenizer if card else model.backbone


def check_vocabulary(model: Model) -> None:
    """Raise UserError where a vocabulary is to be trimmed that has nothing to trim, or a full one is to get more."""
    if model.vocabulary_text and model.vocabulary == "full":
        raise UserError(
            f"model.vocabulary_text={model.vocabulary_text}, but model.vocabulary=full keeps all tokens",
            "set model.vocabulary=corpus, or leave out model.vocabulary_text",
        )
    tokenizer = tokenizer_of(model)
    if model.vocabulary == "corpus" and tokenizer in ("bytes", "train"):
        why = "its tokens are bytes" if tokenizer == "bytes" else "it is learnt from the corpus"
        default = "" if model.tokenizer else ", which random weights have unless the recipe names a tokenizer"
        raise UserError(
            f"model.vocabulary=corpus: there is nothing to trim of model.tokenizer={tokenizer}{default}: {why}",
            "set model.vocabulary=full, or model.tokenizer to a hub id or a folder",
        )


def language_of(recipe: Recipe) -> str | None:
    """The language code that every text begins with: the recipe's; else the card's, where its tokenizer is in use."""
    if recipe.evaluation.forced_language:
        return recipe.evaluation.forced_language
    card = card_of(recipe.model)
    return card.language if card and tokenizer_of(recipe.model) == card.tokenizer else None


_T5: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
_BART: dict[str, Any] = {
    "d_model": 64,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 128 for half in ("encoder", "decoder")},
}
_LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_WINDOW_AND_ALL = {**_LANGUAGE_MODEL, "layer_types": ["sliding_attention", "full_attention"]}
# How each architecture shrinks: the largest value that each key keeps; a list replaces the published one. Keys that are
# not named stay as published, so activation, biases, tying and positions remain the architecture's own.
TINY_LIMITS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "m2m_100", "pegasus", "marian"), _BART),
    "longt5": {**_T5, "local_radius": 15, "global_block_size": 4},
    "led": {
        **_BART,
        "attention_window": [32, 32],
        "max_encoder_position_embeddings": 1024,
        "max_decoder_position_embeddings": 1024,
    },
    **dict.fromkeys(("llama", "mistral", "gemma"), _LANGUAGE_MODEL),
    **{name: {**_LANGUAGE_MODEL, "layer_types": ["full_attention"] * 2} for name in ("qwen2", "qwen3")},
    "gemma2": _WINDOW_AND_ALL,
    "t5gemma": {"encoder": _WINDOW_AND_ALL, "decoder": _WINDOW_AND_ALL},
    "t5gemma2": {"encoder": {"text_config": _WINDOW_AND_ALL}, "decoder": _WINDOW_AND_ALL},
    "encoder-decoder": {
        "encoder": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
        "decoder": {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 2},
    },
}


def tiny_config(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` shrunk to two narrow layers of the same architecture, trained in seconds.

    Raises:
        UserError: no small version of this architecture is known.
    """
    limits = TINY_LIMITS.get(architecture)
    if limits is None:
        raise UserError(
            f"model.tiny=true: no small version of a {architecture} is known",
            f"set model.tiny=false, or choose a backbone of {', '.join(sorted(TINY_LIMITS))}",
        )
    return _limited(config, limits)


def _limited(config: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    limited = dict(config)
    for key, limit in limits.items():
        value = config.get(key)
        if isinstance(limit, dict):
            limited[key] = _limited(value or {}, limit)
        elif isinstance(limit, list) or value is None:
            limited[key] = limit
        else:
            limited[key] = min(limit, value)
    return limited
