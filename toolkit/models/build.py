"""From a recipe and a corpus to a translator with its processor: loaded, or made from a model card's dimensions."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.adapters import adapt
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.materialise import Placement, placement_of, published_backbone, random_backbone, settle
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
    backbone = _backbone(model, tokenizer, placement, recipe.training.seed)
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
    if placement.quantization:
        mark(translator, placement.quantization)
    adapt(translator, model)
    settle(translator, placement)
    if recipe.training.gradient_checkpointing:
        # Reentrant checkpointing loses the gradients of whatever lies before inputs that need none.
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return translator


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


def _backbone(model: Model, tokenizer: PreTrainedTokenizerBase, placement: Placement, seed: int) -> PreTrainedModel:
    config = _backbone_config(model)
    if model.dropout is not None:
        for key in DROPOUT_KEYS:
            if hasattr(config, key):
                setattr(config, key, model.dropout)
    if model.from_scratch or model.tiny:
        card = card_of(model)
        if tokenizer_of(model) != (card.tokenizer if card else model.backbone):
            _speak(config, tokenizer)
        return random_backbone(config, placement, seed=seed)
    try:
        return published_backbone(_source(model), config, placement, trust_remote_code=model.trust_remote_code)
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
