"""From a recipe and a corpus to a translator with its processor: loaded, or made from a model card's dimensions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.adapters import adapt
from toolkit.models.base import Base, Fingerprint
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.extra_tokens import add_rows, add_tokens, make_room
from toolkit.models.materialise import (
    Placement,
    placement_for,
    placement_of,
    published_backbone,
    random_backbone,
    settle,
)
from toolkit.models.processor import PoseFeatureExtractor, PoseProcessor
from toolkit.models.quantisation import mark
from toolkit.models.tokenizers import language_id, make_tokenizer, special_ids
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.cells import cell_of, refusal_in_words
from toolkit.recipe.model_cards import card_of, tiny_config, tokenizer_of
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Evaluation, Model, Recipe

# Architectures name their dropout differently; `model.dropout` sets whichever of these a configuration has.
DROPOUT_KEYS = ("dropout_rate", "dropout", "attention_dropout", "activation_dropout")


def build_processor(recipe: Recipe, corpus: Corpus) -> PoseProcessor:
    """The processor that goes with a model trained on ``corpus``.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    metadata = corpus.metadata
    texts = corpus.splits["train"].texts
    tokenizer = make_tokenizer(tokenizer_of(recipe.model), texts, trust_remote_code=recipe.model.trust_remote_code)
    add_tokens(tokenizer, recipe.model.extra_tokens)
    extractor = PoseFeatureExtractor(
        landmark_set=metadata.landmark_set,
        fps=metadata.fps,
        max_frames=metadata.max_frames,
        too_long=metadata.too_long,
        normalisation=metadata.normalisation,
    )
    return PoseProcessor(extractor, tokenizer)


def build_translator(resolved: ResolvedRun, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> PoseTranslator:
    """The translator, with the backbone's published weights or random ones, in the form in which the run holds them.

    All ranks call this. The recipe's seed decides the backbone's random weights, on any number of ranks and at any ZeRO
    stage; those of the pose encoder come from torch's generator, which all ranks seed alike.

    Raises:
        UserError: the backbone cannot be had.
    """
    recipe = resolved.recipe
    model = recipe.model
    placement = placement_of(resolved)
    fingerprint = Fingerprint() if stands_on_base(model) else None
    backbone = _backbone(model, tokenizer, placement, recipe.training.seed, fingerprint)
    prefix_ids = tokenizer(model.prefix, add_special_tokens=False)["input_ids"] if model.prefix else []
    config = PoseTranslatorConfig(
        # Where the backbone was loaded from is this machine's business.
        backbone={key: value for key, value in backbone.config.to_dict().items() if key != "_name_or_path"},
        pose_encoder=model.pose_encoder.model_dump(),
        num_points=corpus.landmark_set.num_points,
        num_channels=corpus.landmark_set.num_channels,
        landmark_set=corpus.landmark_set.to_dict(),
        ctc=recipe.training.ctc_weight > 0,
        ctc_search_weight=recipe.evaluation.ctc_weight,
        special_token_ids=special_ids(tokenizer),
        prefix_token_ids=prefix_ids,
    )
    translator = PoseTranslator(config, backbone)
    _remember_generation(translator, recipe.evaluation, tokenizer)
    _finish(translator, model, tokenizer, placement)
    if fingerprint:
        translator.base = Base(
            name=_base_name(model),
            model=model.model_dump(mode="json"),
            seed=recipe.training.seed,
            precision=resolved.precision,
            fingerprint=fingerprint.hexdigest(),
        )
    if recipe.training.gradient_checkpointing:
        # Reentrant checkpointing loses the gradients of whatever lies before inputs that need none.
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return translator


def rebuild_translator(
    config: PoseTranslatorConfig, base: Base, tokenizer: PreTrainedTokenizerBase
) -> tuple[PoseTranslator, str]:
    """The translator as it was before it was trained, to put what was trained onto it.

    Args:
        config: of the trained one.
        base: what it stands on.
        tokenizer: of the trained one, with its extra tokens.

    Returns:
        the translator, and the fingerprint of the backbone that was found or made.

    Raises:
        UserError: the backbone cannot be had.
    """
    settings = Model.model_validate(base.model)
    placement = placement_for(base.precision, settings.quantization)
    fingerprint = Fingerprint()
    torch.manual_seed(base.seed)
    translator = PoseTranslator(config, _backbone(settings, tokenizer, placement, base.seed, fingerprint))
    _finish(translator, settings, tokenizer, placement)
    return translator, fingerprint.hexdigest()


def stands_on_base(settings: Model) -> bool:
    """Whether a run of this model saves only what it trained, because the rest can be had again."""
    return settings.lora is not None or settings.quantization is not None


def _base_name(settings: Model) -> str:
    card = card_of(settings)
    if settings.from_scratch or settings.tiny:
        return f"{settings.backbone}{', shrunk' if settings.tiny else ''}, from random weights"
    return (card and card.hub_id) or settings.backbone


def _finish(
    translator: PoseTranslator, settings: Model, tokenizer: PreTrainedTokenizerBase, placement: Placement
) -> None:
    """What comes on top of a backbone with its weights: new tokens, adapters, and the form of the run."""
    if placement.quantization:
        mark(translator, placement.quantization)
    add_rows(translator, settings, tokenizer)
    adapt(translator, settings)
    settle(translator, placement)


def check_model(resolved: ResolvedRun) -> None:
    """See that the backbone can be had and trained as the run wants it; loads no weights and needs no process group.

    Raises:
        UserError: it cannot be had, is no encoder-decoder, or stands in a refused cell of the compatibility table.
    """
    model = resolved.recipe.model
    config = _backbone_config(model)
    if not config.is_encoder_decoder:
        raise UserError(
            f"model.backbone={model.backbone} is a {config.model_type}, not an encoder-decoder: choose a seq2seq "
            "model; `python launch/recipes.py ls` shows some"
        )
    refusal = refusal_in_words(cell_of(resolved.recipe, resolved.deepspeed, config.model_type))
    if refusal:
        raise UserError(f"model.backbone={model.backbone}: {refusal}")


def _backbone(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
    seed: int,
    fingerprint: Fingerprint | None,
) -> PreTrainedModel:
    config = _backbone_config(model)
    if model.dropout is not None:
        for key in DROPOUT_KEYS:
            if hasattr(config, key):
                setattr(config, key, model.dropout)
    random = model.from_scratch or model.tiny
    card = card_of(model)
    if random and tokenizer_of(model) != (card.tokenizer if card else model.backbone):
        _speak(config, tokenizer)
    make_room(config, tokenizer, model.extra_tokens)
    if random:
        return random_backbone(config, placement, seed=seed, fingerprint=fingerprint)
    try:
        return published_backbone(
            _source(model),
            config,
            placement,
            trust_remote_code=model.trust_remote_code,
            fingerprint=fingerprint,
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(model, error) from error


def _backbone_config(model: Model) -> PreTrainedConfig:
    """The backbone's configuration: of its model card when it starts from random weights, else of the hub or folder."""
    card = card_of(model)
    if card and (model.from_scratch or model.tiny):
        values = tiny_config(card.architecture, card.config) if model.tiny else card.config
        return AutoConfig.for_model(card.architecture, **values)
    try:
        config = AutoConfig.from_pretrained(_source(model), trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loadable(model, error) from error
    if model.tiny:
        values = {**config.to_dict(), **tiny_config(config.model_type, config.to_dict())}
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return config


def _source(model: Model) -> str:
    """Hub id or folder of the backbone."""
    card = card_of(model)
    return card.hub_id if card and card.hub_id else model.backbone


def _not_loadable(model: Model, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"model.backbone={model.backbone} cannot be loaded ({reason}): name a folder that holds it, set HF_HOME to a "
        "cache that does, or train from random weights with model.from_scratch=true"
    )


def _speak(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fit a configuration for random weights to another vocabulary than its published one."""
    config.vocab_size = len(tokenizer)
    starts_with_padding = config.decoder_start_token_id == config.pad_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.decoder_start_token_id = tokenizer.pad_token_id if starts_with_padding else tokenizer.eos_token_id


def _remember_generation(
    translator: PoseTranslator, evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Let the saved folder translate as the recipe evaluates."""
    settings: dict[str, Any] = {
        "num_beams": evaluation.num_beams,
        # Greedy search has no use for a length penalty, and transformers refuses to save one beside it.
        **({"length_penalty": evaluation.length_penalty} if evaluation.num_beams > 1 else {}),
        "no_repeat_ngram_size": evaluation.no_repeat_ngram_size,
        "max_new_tokens": evaluation.max_new_tokens,
    }
    generation = translator.generation_config
    generation.update(**settings)
    if evaluation.forced_language:
        generation.forced_bos_token_id = language_id(tokenizer, evaluation.forced_language)
    for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        setattr(generation, key, getattr(translator.config, key))
