"""The backbone's configuration for a run: of a model card, the hub or a folder, fitted to tokenizer and recipe.

Where card, recipe and published ``config.json`` disagree is found here, before any weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.models.adaptation.extra_tokens import reserve_rows, table_rows
from toolkit.models.backbone import (
    OF_LANGUAGE_MODELS,
    decoder_config,
    encoder_config,
    is_seq2seq,
    note_published,
    vocabulary_size,
)
from toolkit.models.language_models.prefixes import is_language_model
from toolkit.models.language_models.prompts import words_around_poses
from toolkit.models.loading.hub import NOT_LOADED, hub_trouble
from toolkit.models.tokenizers import text_frame
from toolkit.models.vocabulary.ids import ids_of, renumber
from toolkit.models.vocabulary.trimming import KEY as TRIM_KEY
from toolkit.models.vocabulary.trimming import Trimming, trimming_of
from toolkit.recipe.deepspeed.compatibility import LANGUAGE_MODELS
from toolkit.recipe.model_cards import ModelCard, card_of, reads_published, tiny_config, tokenizer_of
from toolkit.recipe.sections.model import Model

# Architectures name their dropout differently; `model.dropout` sets whichever of these a configuration has.
DROPOUT_KEYS = (
    *("dropout_rate", "dropout", "attention_dropout", "activation_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
)
# A layer that is skipped at random has no gradient in that step; under ZeRO stage 3 ranks would gather different layers
# and hang.
LAYER_DROP_KEYS = ("encoder_layerdrop", "decoder_layerdrop")
OTHERS_HINT = "choose another model that reads vectors; `python launch/recipes.py ls` shows some"


def source_of(model: Model) -> str:
    """Hub id or folder of the backbone's published weights."""
    card = card_of(model)
    return card.hub_id if card and card.hub_id else model.backbone


def backbone_config(model: Model) -> PreTrainedConfig:
    """The configuration of the backbone, as published or shrunk.

    Raises:
        UserError: there is no such model, it needs code that may not run, its dimensions are not the card's, or it is
            neither an encoder-decoder for texts nor a language model that is known here.
    """
    card = card_of(model)
    if card and not reads_published(model):
        return _from_values(card.architecture, card.config, tiny=model.tiny)
    try:
        values, _ = PreTrainedConfig.get_config_dict(source_of(model))
        config = AutoConfig.from_pretrained(source_of(model), trust_remote_code=model.trust_remote_code)
    except NOT_LOADED as error:
        raise not_loadable(model, error) from error
    if card:
        _check_against_card(card, {**config.to_dict(), **values}, source_of(model))
    _check_architecture(config, model.backbone)
    if model.tiny:
        return _from_values(config.model_type, {**config.to_dict(), **values}, tiny=True)
    note_published(config, values)
    return config


def _check_architecture(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError unless this configures an encoder-decoder for texts or a language model that is known here.

    ``name`` is for the message.
    """
    if is_language_model(config) or (config.is_encoder_decoder and is_seq2seq(config)):
        return
    known = f"an encoder-decoder, nor a language model that is known here ({', '.join(LANGUAGE_MODELS)})"
    kind = "not a model that writes text from text" if config.is_encoder_decoder else f"neither {known}"
    raise UserError(f"model.backbone={name} is a {config.model_type}, {kind}", OTHERS_HINT)


def is_for_language_model(model: Model) -> bool:
    """Whether the tokenizer of a run is one that a language model may bring, which ends no text; may read the hub."""
    if tokenizer_of(model) in ("bytes", "train"):
        return False
    config = backbone_config(model)
    return is_language_model(config) or config.model_type in OF_LANGUAGE_MODELS


def fit_dropout(config: PreTrainedConfig, model: Model) -> None:
    """Set, in place, a configuration's dropout to the recipe's; no layer is dropped."""
    for part in _parts(config):
        for key in DROPOUT_KEYS:
            if model.dropout is not None and hasattr(part, key):
                setattr(part, key, model.dropout)
        for key in LAYER_DROP_KEYS:
            if hasattr(part, key):
                setattr(part, key, 0.0)


def fitted_config(model: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The backbone's configuration, with a row for every token; raises as the two that it calls."""
    config = backbone_config(model)
    fit_config(config, model, tokenizer)
    reserve_rows(config, tokenizer, model.extra_tokens)
    return config


def full_config(model: Model, tokenizer: PreTrainedTokenizerBase, trimming: Trimming) -> PreTrainedConfig:
    """The configuration of the backbone whose tables are trimmed for this tokenizer: rows and ids of the full one."""
    config = backbone_config(model)
    if _has_own_vocabulary(model):
        _fit_vocabulary(config, tokenizer)
        for part in _parts(config):
            renumber(part, dict(enumerate(trimming.kept)))
        fit_rows(config, trimming.tokens)
    return config


def published_ids(model: Model) -> set[int]:
    """The tokens that the backbone's configuration names; none where the run's vocabulary is another one."""
    if _has_own_vocabulary(model):
        return set()
    return {place for part in _parts(backbone_config(model)) for place in ids_of(part)}


def fit_config(config: PreTrainedConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fit a configuration, in place, to a run: its dropout, its vocabulary, how its texts begin and end.

    Raises:
        UserError: published weights do not have as many embedding rows as the tokenizer has tokens; a vocabulary is to
            be trimmed that the backbone has not got, or has two of.
    """
    fit_dropout(config, model)
    trimming = trimming_of(tokenizer)
    if trimming and len(table_rows(config)) > 1:
        raise UserError(
            f"{TRIM_KEY}: encoder and decoder of model.backbone={model.backbone} have a vocabulary each",
            "set model.vocabulary=full",
        )
    if _has_own_vocabulary(model):
        _fit_vocabulary(config, tokenizer)
    elif trimming:
        _check_vocabulary(config, model, trimming.tokens + len(model.extra_tokens))
        for part in _parts(config):
            renumber(part, trimming.new_ids)
        fit_rows(config, len(trimming.kept))
    else:
        _check_vocabulary(config, model, len(tokenizer))
    if is_language_model(config):
        _fit_text_tokens(config, model, tokenizer)
        return
    if config.model_type in OF_LANGUAGE_MODELS:
        for part in _parts(config):
            part.eos_token_id = tokenizer.eos_token_id  # those that were trained to chat list several
        # transformers reads from there how texts begin.
        decoder_config(config).bos_token_id = config.decoder_start_token_id
    _, behind = text_frame(tokenizer)
    if behind:
        # The first mBART writes the language code behind a text and starts the next one from it.
        config.decoder_start_token_id = behind[-1]


def not_loadable(model: Model, error: Exception) -> UserError:
    """The error to raise where transformers cannot load the backbone."""
    source, reason = source_of(model), " ".join(str(error).split())
    where = f"model.backbone={model.backbone}"
    if "trust_remote_code" in reason:
        return UserError(
            f"{where}: {source} needs Python code from the hub, which model.trust_remote_code=false forbids",
            "read its code, and set model.trust_remote_code=true if you trust it",
        )
    if Path(source).is_dir():
        return UserError(
            f"{where}: the folder holds no usable model: {_shortened(reason)}",
            "name a folder that transformers' save_pretrained wrote (config.json and weights)",
        )
    if trouble := hub_trouble(error, source):
        return UserError(
            f"{where}: {source} {trouble.what}",
            f"{trouble.remedy}; or set model.backbone=FOLDER, or model.from_scratch=true for random weights",
        )
    return UserError(
        f"{where}: {source} cannot be loaded: {_shortened(reason)}",
        f"see what `python launch/recipes.py check-model {source}` says, or choose another model",
    )


def _shortened(reason: str) -> str:
    """What another library says, as part of a message of ours."""
    return reason[:200].rstrip(". :")


def _from_values(architecture: str, values: dict[str, Any], *, tiny: bool) -> PreTrainedConfig:
    values = tiny_config(architecture, values) if tiny else values
    config = AutoConfig.for_model(architecture, **{key: value for key, value in values.items() if key != "model_type"})
    note_published(config, values)
    return config


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and those of its halves, each once."""
    yield from {id(part): part for part in (config, encoder_config(config), decoder_config(config))}.values()


def fit_rows(config: PreTrainedConfig, tokens: int) -> None:
    """Set, in place, how many tokens a configuration for random weights has."""
    for part in _parts(config):
        part.vocab_size = tokens
        if hasattr(part, "decoder_vocab_size"):
            part.decoder_vocab_size = tokens


def _has_own_vocabulary(model: Model) -> bool:
    """Whether a run has another tokenizer than its backbone was published with, and so random tables."""
    card = card_of(model)
    return not reads_published(model) and tokenizer_of(model) != (card.tokenizer if card else model.backbone)


def _fit_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fit a configuration for random weights to another vocabulary than its published one."""
    fit_rows(config, len(tokenizer))
    if is_language_model(config):
        return
    starts_with_padding = config.decoder_start_token_id == config.pad_token_id
    for part in _parts(config):
        part.pad_token_id = tokenizer.pad_token_id
        part.eos_token_id = tokenizer.eos_token_id
        # Ids of the published vocabulary, which mean something else in this one.
        for key in ("bos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
            if hasattr(part, key):
                setattr(part, key, None)
    config.decoder_start_token_id = tokenizer.pad_token_id if starts_with_padding else tokenizer.eos_token_id


def _fit_text_tokens(config: PreTrainedConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a language model begin and end texts as its tokenizer does; what was published may list several ends."""
    config.eos_token_id = tokenizer.eos_token_id
    # The embedding of the token for padding does not train.
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    config.decoder_start_token_id = words_around_poses(model, tokenizer).start


def _check_vocabulary(config: PreTrainedConfig, model: Model, tokens: int) -> None:
    """Raise UserError where published weights lack a row for a token that the recipe does not add."""
    rows = vocabulary_size(config)
    if tokens - len(model.extra_tokens) > rows:
        raise UserError(
            f"model.tokenizer={tokenizer_of(model)} has {tokens} tokens and model.backbone={model.backbone} only "
            f"{rows} embedding rows",
            "drop model.tokenizer, or add model.from_scratch=true",
        )


def _check_against_card(card: ModelCard, found: dict[str, Any], source: str) -> None:
    """Raise UserError, with all of them, where a published configuration has other dimensions than the card."""
    others = list(_differences(card.config, found))
    if card.architecture != found.get("model_type"):
        others.insert(0, f"model_type: {card.architecture} on the card, {found.get('model_type')} found")
    if others:
        raise UserError(
            f"{source} is not what the model card {card.name} says ({'; '.join(others)})",
            f"correct the card, or name the model itself: model.backbone={source}",
        )


def _differences(card: dict[str, Any], found: dict[str, Any], path: str = "") -> Iterator[str]:
    """Dimensions that differ: the whole numbers of a card but for the ids of tokens."""
    for key, value in card.items():
        other = found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{path}{key}.")
        elif type(value) is int and not key.endswith("_id") and value != other:
            yield f"{path}{key}: {value} on the card, {other} found"
