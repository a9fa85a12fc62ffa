"""Checks that a backbone can be trained as a recipe asks, before weights are read and a process group exists."""

from __future__ import annotations

from transformers import PreTrainedModel

from toolkit.corpus.mixture.opening import open_prepared
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.adaptation.adapters import lora_targets
from toolkit.models.backbone import (
    context_limit,
    empty_backbone,
    halves,
    is_known,
    position_limit,
    takes_vectors,
)
from toolkit.models.backbone_config import OTHERS_HINT, backbone_config
from toolkit.models.language_models.prefixes import is_language_model
from toolkit.models.language_models.tensor_plan import check_division
from toolkit.recipe.deepspeed.cells import cell_of, cell_problem
from toolkit.recipe.prompts import own_words, placeholders
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Data, MixPart, Recipe
from toolkit.recipe.sections.model import PoseEncoder


def check_model(resolved: ResolvedRun) -> None:
    """See that the backbone can be loaded and trained as the recipe asks; reads no weights and needs no process group.

    Raises:
        UserError: it cannot be loaded, is neither an encoder-decoder nor a known language model, reads no vectors, has
            too few positions, lacks a part that is to be frozen or a layer that LoRA is to adapt, or is in a refused
            cell of the compatibility table.
    """
    model = resolved.recipe.model
    config = backbone_config(model)
    problem = cell_problem(cell_of(resolved.recipe, resolved.deepspeed, config.model_type), model.backbone)
    if problem:
        raise problem
    check_division(config, resolved.tensor_parallel_size, model.backbone)
    if not is_known(config):
        return  # what code from the hub can do shows when it runs
    backbone = empty_backbone(config)
    if not takes_vectors(backbone):
        raise UserError(
            f"model.backbone={model.backbone}: the encoder of a {config.model_type} takes no inputs_embeds for poses",
            OTHERS_HINT,
        )
    if model.prompt and not is_language_model(config):
        raise UserError(
            f"model.prompt is for language models, and model.backbone={model.backbone} is a {config.model_type}",
            "set model.prefix instead: words before the poses",
        )
    if "encoder" in model.freeze and halves(backbone)[0] is None:
        raise UserError(
            f"model.freeze=[encoder]: model.backbone={model.backbone} is a {config.model_type} and has no encoder",
            "freeze decoder or embeddings, or leave model.freeze empty",
        )
    if model.lora:
        lora_targets(backbone, model)
    corpus = open_prepared(resolved.recipe.data)
    frames = corpus.metadata.max_frames if corpus else resolved.recipe.data.max_frames
    check_fusion(resolved.recipe, corpus)
    # How many tokens a fixed prefix has shows when the tokenizer is there.
    prefix = model.max_prefix_tokens if placeholders(own_words(model.prefix, model.prompt)) else 0
    check_positions(resolved.recipe, backbone, frames, prefix, corpus)


def check_fusion(recipe: Recipe, corpus: Corpus | None) -> None:
    """Raise UserError where CTC would read a clip twice: its poses, and then its features."""
    if concatenates(recipe, corpus) and recipe.training.ctc_weight:
        raise UserError(
            f"training.ctc_weight={recipe.training.ctc_weight:g} aligns a text with the clip from its beginning to its "
            "end, and model.fusion=concat gives the clip twice",
            "set model.fusion=sum, or training.ctc_weight=0",
        )


def concatenates(recipe: Recipe, corpus: Corpus | None) -> bool:
    """Whether the backbone gets the vectors of the features behind those of the poses."""
    places: list[Data | MixPart] = [recipe.data, *recipe.data.corpora]
    has_both = any(place.poses and place.features for place in places)
    if corpus:
        has_both = bool(corpus.landmark_set.num_points and corpus.metadata.num_features)
    return has_both and recipe.model.fusion == "concat"


def check_positions(
    recipe: Recipe, backbone: PreTrainedModel, max_frames: int | None, prefix: int, corpus: Corpus | None = None
) -> None:
    """See that the backbone has as many positions as the longest clip and the longest text take.

    ``prefix`` tokens stand before the poses; ``max_frames`` and ``corpus`` are None where they are not known.

    Raises:
        UserError: it does not.
    """
    name, pose_encoder = recipe.model.backbone, recipe.model.pose_encoder
    vectors = 2 if concatenates(recipe, corpus) else 1
    positions = vectors * encoder_positions(pose_encoder, max_frames or 0)
    encoder, decoder = halves(backbone)
    if encoder is None:
        _check_context(recipe, backbone, max_frames or 0, positions, prefix)
        return
    limit = position_limit(encoder)
    needed = prefix + positions
    if limit is not None and needed > limit:
        fitting = (limit - prefix) // vectors * pose_encoder.frames_per_position
        shorter = (
            "pose_encoder=conv, which shortens them"
            if pose_encoder.kind == "linear"
            else "pose_encoder.stride=4 or more"
        )
        raise UserError(
            f"model.backbone={name} has {limit} encoder positions; clips of {max_frames} frames"
            f"{f' after a prefix of {prefix} tokens' if prefix else ''} take {needed}",
            f"set data.max_frames={fitting}, or model.{shorter}",
        )
    limit = position_limit(decoder)
    lengths = {
        "training.max_target_tokens": recipe.training.max_target_tokens,
        "evaluation.max_new_tokens": recipe.evaluation.max_new_tokens,
    }
    needed = max(lengths.values())
    if limit is not None and needed > limit:
        remedy = " ".join(f"{key}={limit}" for key, length in lengths.items() if length > limit)
        raise UserError(
            f"model.backbone={name} has {limit} decoder positions, and texts take up to {needed}", f"set {remedy}"
        )


def _check_context(recipe: Recipe, backbone: PreTrainedModel, max_frames: int, positions: int, prefix: int) -> None:
    """See that prefix, so many positions of a clip, start token and text fit into a language model's context."""
    limit, tokens = context_limit(backbone), max(recipe.training.max_target_tokens, recipe.evaluation.max_new_tokens)
    needed = prefix + positions + 1 + tokens
    if needed > limit:
        fitting = max(0, limit - prefix - 1 - tokens) * max_frames // positions
        raise UserError(
            f"model.backbone={recipe.model.backbone} has a context of {limit} positions; clips of {max_frames} frames, "
            f"{prefix} tokens beside them and texts of {tokens} tokens take {needed}",
            f"set data.max_frames={fitting}, a larger model.pose_encoder.stride, or fewer training.max_target_tokens "
            "and evaluation.max_new_tokens",
        )


def encoder_positions(pose_encoder: PoseEncoder, frames: int) -> int:
    """Vectors that the pose encoder makes of a clip."""
    return -(-frames // pose_encoder.frames_per_position)
