"""The translator and the processor that a recipe describes, with published weights or random ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.batching.glosses import glosses_of
from toolkit.corpus.packed import Corpus
from toolkit.models.adaptation.adapters import adapt
from toolkit.models.adaptation.extra_tokens import add_rows, add_tokens
from toolkit.models.adaptation.quantisation import mark_quantised
from toolkit.models.backbone import empty_backbone, is_known, set_checkpointing
from toolkit.models.backbone_config import (
    backbone_config,
    fitted_config,
    full_config,
    not_loadable,
    published_ids,
    source_of,
)
from toolkit.models.check import check_positions
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.language_models.prefixes import is_language_model, recomputation
from toolkit.models.language_models.prompts import words_around_poses
from toolkit.models.loading.backbone_weights import (
    Placement,
    place_added_modules,
    placement_for,
    placement_of,
    published_backbone,
    random_backbone,
)
from toolkit.models.loading.base_model import BaseReference, Fingerprint, Override
from toolkit.models.loading.hub import NOT_LOADED, fetch_weights
from toolkit.models.processor import PoseFeatureExtractor, PoseProcessor
from toolkit.models.tokenizers import special_ids, text_frame
from toolkit.models.translator import PoseTranslator
from toolkit.models.vocabulary.needed import run_tokenizer
from toolkit.models.vocabulary.tables import Trim
from toolkit.models.vocabulary.trimming import trimming_of
from toolkit.models.warm_start.filling import WarmStart, frozen_weights
from toolkit.recipe.model_cards import card_of, reads_published
from toolkit.recipe.prompts import own_words, placeholders
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Evaluation, Recipe
from toolkit.recipe.sections.model import Model


def build_processor(recipe: Recipe, corpus: Corpus) -> PoseProcessor:
    """The processor that goes with a model trained on ``corpus``.

    Raises:
        UserError: the tokenizer cannot be loaded, or not be trimmed.
    """
    metadata = corpus.metadata
    trims = recipe.model.vocabulary == "corpus"
    tokenizer = run_tokenizer(recipe, corpus, published_ids(recipe.model) if trims else ())
    add_tokens(tokenizer, recipe.model.extra_tokens)
    extractor = PoseFeatureExtractor(
        landmark_set=metadata.landmark_set,
        fps=metadata.fps,
        max_frames=metadata.max_frames,
        too_long=metadata.too_long,
        normalisation=metadata.normalisation,
        num_features=metadata.num_features,
        **_of_clips(recipe.model),
    )
    return PoseProcessor(extractor, tokenizer)


def build_translator(
    resolved: ResolvedRun, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, start: WarmStart | None = None
) -> PoseTranslator:
    """The translator, with the backbone's published weights or random ones, in the form in which the run holds them.

    All ranks call this. ``start`` gives it weights of another translator. The recipe's seed decides the backbone's
    random weights, on any number of ranks and at any ZeRO stage; those of the pose encoder come from torch's generator,
    which all ranks seed alike.

    Raises:
        UserError: the backbone cannot be loaded, or has fewer positions than the longest clip and the prefix take.
    """
    recipe = resolved.recipe
    model = recipe.model
    placement = placement_of(resolved)
    fingerprint = Fingerprint() if stands_on_base(model) else None
    described = fitted_config(model, tokenizer)
    prefix = _prefix(model, tokenizer, described)
    if is_known(described):
        check_positions(recipe, empty_backbone(described), corpus.metadata.max_frames, _longest(prefix), corpus)
    start = start or WarmStart(None)
    with start.override() as override:
        backbone = backbone_with_weights(
            described, model, tokenizer, placement, recipe.training.seed, fingerprint, override
        )
    config = PoseTranslatorConfig(
        # Without the path that the backbone was loaded from.
        backbone={key: value for key, value in backbone.config.to_dict().items() if key != "_name_or_path"},
        pose_encoder=model.pose_encoder.model_dump(),
        num_points=corpus.landmark_set.num_points,
        num_channels=corpus.landmark_set.num_channels,
        landmark_set=corpus.landmark_set.to_dict(),
        num_features=corpus.metadata.num_features,
        feature_encoder=model.feature_encoder.model_dump(),
        fusion=model.fusion,
        ctc=recipe.training.ctc_weight > 0,
        ctc_vocabulary=glosses_of(recipe, corpus),
        ctc_search_weight=recipe.evaluation.ctc_weight,
        special_token_ids=special_ids(tokenizer),
        **prefix,
        lineage=start.lineage,
    )
    published = GenerationConfig(**start.generation) if start.generation else backbone.generation_config
    translator = PoseTranslator(config, backbone)
    start.fill_added(translator)
    _set_generation(translator, recipe.evaluation, text_frame(tokenizer)[0], published)
    _complete(translator, model, tokenizer, placement, start.known_tokens(tokenizer, model.extra_tokens))
    if fingerprint:
        translator.base = BaseReference(
            name=_base_name(model),
            model=model.model_dump(mode="json"),
            seed=recipe.training.seed,
            precision=resolved.precision,
            fingerprint=fingerprint.hexdigest(),
            weights=start.base,
        )
    if resolved.recomputes:
        set_checkpointing(backbone, True, **recomputation(backbone))
    return translator


def _prefix(model: Model, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Any]:
    """What the translator's configuration says about the words beside its poses: of all clips, and a template."""
    if is_language_model(config):
        words = words_around_poses(model, tokenizer)
        return {"prefix_token_ids": words.before, "suffix_token_ids": words.behind, **_of_clips(model)}
    own = _of_clips(model)
    ids = tokenizer(model.prefix, add_special_tokens=False)["input_ids"] if model.prefix and not own else []
    return {"prefix_token_ids": ids, **own}


def _of_clips(model: Model) -> dict[str, Any]:
    """The same about words that differ from clip to clip."""
    words = own_words(model.prefix, model.prompt)
    if not placeholders(words):
        return {}
    return {"prefix_template": words, "max_prefix_tokens": model.max_prefix_tokens}


def _longest(prefix: dict[str, Any]) -> int:
    fixed = len(prefix["prefix_token_ids"]) + len(prefix.get("suffix_token_ids", ()))
    return fixed + int(prefix.get("max_prefix_tokens", 0))


def rebuild_translator(
    config: PoseTranslatorConfig,
    base: BaseReference,
    tokenizer: PreTrainedTokenizerBase,
    *,
    zero3: dict[str, Any] | None = None,
) -> tuple[PoseTranslator, str]:
    """The translator as it was before training, into which trained weights are then loaded.

    ``zero3`` is a DeepSpeed configuration whose stage 3 partitions the weights; all ranks then call this.

    Returns:
        the translator, and the fingerprint of the backbone that was found or made, empty on ranks that received it.

    Raises:
        UserError: the backbone cannot be loaded.
    """
    settings = Model.model_validate(base.model)
    placement = placement_for(base.precision, settings.quantization, zero3=zero3)
    fingerprint = Fingerprint()
    torch.manual_seed(base.seed)
    described = fitted_config(settings, tokenizer)
    if base.weights:
        read = frozen_weights(base.weights)
        backbone = random_backbone(described, placement, seed=base.seed, fingerprint=fingerprint, override=read)
    else:
        backbone = backbone_with_weights(described, settings, tokenizer, placement, base.seed, fingerprint)
    translator = PoseTranslator(config, backbone)
    _complete(translator, settings, tokenizer, placement)
    return translator, fingerprint.hexdigest()


def stands_on_base(settings: Model) -> bool:
    """Whether a run of this model saves only what it trained, because the rest can be loaded or made again."""
    return settings.lora is not None or settings.quantization is not None


def _base_name(settings: Model) -> str:
    card = card_of(settings)
    if settings.init_from:
        return f"{settings.backbone}, from {settings.init_from}"
    if not reads_published(settings):
        return f"{settings.backbone}{', shrunk' if settings.tiny else ''}, from random weights"
    return (card and card.hub_id) or settings.backbone


def _complete(
    translator: PoseTranslator,
    settings: Model,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
    known_tokens: list[bool] | None = None,
) -> None:
    """Add to a backbone with weights what the recipe asks for: rows of new tokens and adapters, in the run's dtype."""
    if placement.quantization:
        mark_quantised(translator, placement.quantization)
    add_rows(translator, settings, tokenizer, known_tokens)
    adapt(translator, settings)
    place_added_modules(translator, placement)


def fetch_backbone(model: Model) -> None:
    """Download a backbone's published files into this machine's cache; builds nothing.

    Raises:
        UserError: they cannot be downloaded.
    """
    if not reads_published(model):
        return
    backbone_config(model)
    try:
        fetch_weights(source_of(model))
    except NOT_LOADED as error:
        raise not_loadable(model, error) from error


def backbone_with_weights(
    config: PreTrainedConfig,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
    seed: int,
    fingerprint: Fingerprint | None,
    override: Override = lambda fallback: fallback,
) -> PreTrainedModel:
    """The backbone with its weights: published, random, or those that the override reads.

    Raises:
        UserError: it cannot be loaded.
    """
    trimming = trimming_of(tokenizer)
    trim = Trim(trimming, full_config(model, tokenizer, trimming)) if trimming else None
    if not reads_published(model):
        return random_backbone(config, placement, seed=seed, fingerprint=fingerprint, override=override, trim=trim)
    try:
        return published_backbone(
            source_of(model),
            config,
            placement,
            trust_remote_code=model.trust_remote_code,
            fingerprint=fingerprint,
            override=override,
            trim=trim,
        )
    except NOT_LOADED as error:
        raise not_loadable(model, error) from error


def _set_generation(
    translator: PoseTranslator, evaluation: Evaluation, frame: list[int], published: GenerationConfig
) -> None:
    """Set how the saved model translates: as the recipe evaluates.

    Of the backbone's published settings tokens that it must not write are kept; how it searches is the recipe's.
    """
    settings: dict[str, Any] = {
        "num_beams": evaluation.num_beams,
        # Greedy search has no use for a length penalty, and transformers refuses to save one beside it.
        **({"length_penalty": evaluation.length_penalty} if evaluation.num_beams > 1 else {}),
        "no_repeat_ngram_size": evaluation.no_repeat_ngram_size,
        "max_new_tokens": evaluation.max_new_tokens,
    }
    generation = translator.generation_config
    generation.update(**settings)
    for key in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        setattr(generation, key, getattr(published, key, None))
    if len(frame) == 1:
        # Every label begins with it (a language code, or BART's <s>), so every output does.
        generation.forced_bos_token_id = frame[0]
    for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        setattr(generation, key, getattr(translator.config, key))
