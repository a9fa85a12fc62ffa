"""Can this backbone be trained as the run wants it? Asked before a weight is read and before a process group exists."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.backbone import empty_backbone, is_known, is_seq2seq, position_limit, takes_vectors
from toolkit.models.backbone_config import backbone_config
from toolkit.recipe.deepspeed.cells import cell_of, cell_problem
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import PoseEncoder, Recipe


def check_model(resolved: ResolvedRun) -> None:
    """See that the backbone can be had and trained as the run wants it; loads no weights and needs no process group.

    Raises:
        UserError: it cannot be had, is no encoder-decoder, reads no vectors, has too few positions, or stands
            in a refused cell of the compatibility table.
    """
    model = resolved.recipe.model
    config = backbone_config(model)
    check_architecture(config, model.backbone)
    problem = cell_problem(cell_of(resolved.recipe, resolved.deepspeed, config.model_type), model.backbone)
    if problem:
        raise problem
    if not is_known(config):
        return  # code from the hub says what it can do once it runs
    backbone = empty_backbone(config)
    if not takes_vectors(backbone):
        raise UserError(
            f"model.backbone={model.backbone}: the encoder of a {config.model_type} reads token ids only (it takes no "
            "inputs_embeds), and poses are none: choose another seq2seq model; `python launch/recipes.py ls` shows some"
        )
    data = resolved.recipe.data
    frames = Corpus.open(data.corpus).metadata.max_frames if data.corpus else data.max_frames
    check_positions(resolved.recipe, backbone, frames, prefix=0)


def check_architecture(config: PreTrainedConfig, name: str) -> None:
    """See that this is an encoder-decoder for texts.

    Args:
        config: of the backbone.
        name: what the user called it.

    Raises:
        UserError: it is not.
    """
    if config.is_encoder_decoder and is_seq2seq(config):
        return
    kind = "a model that writes text from text" if config.is_encoder_decoder else "an encoder-decoder"
    raise UserError(
        f"model.backbone={name} is a {config.model_type}, not {kind}: choose a seq2seq model; "
        "`python launch/recipes.py ls` shows some"
    )


def check_positions(recipe: Recipe, backbone: PreTrainedModel, max_frames: int | None, prefix: int) -> None:
    """See that the backbone tells as many positions apart as the longest clip has, and as the longest text.

    Args:
        recipe: the run's.
        backbone: empty or with weights.
        max_frames: of the longest clip; None = not known.
        prefix: tokens before the poses.

    Raises:
        UserError: it does not; the message says how to mend it.
    """
    name, pose_encoder = recipe.model.backbone, recipe.model.pose_encoder
    limit = position_limit(backbone.get_encoder())
    needed = prefix + encoder_positions(pose_encoder, max_frames or 0)
    if limit is not None and needed > limit:
        fitting = (limit - prefix) * (1 if pose_encoder.kind == "linear" else pose_encoder.stride)
        shorter = (
            "pose_encoder=conv, which shortens them"
            if pose_encoder.kind == "linear"
            else "pose_encoder.stride=4 or more"
        )
        raise UserError(
            f"model.backbone={name} has {limit} encoder positions; clips of {max_frames} frames"
            f"{f' behind a prefix of {prefix} tokens' if prefix else ''} take {needed}: set data.max_frames={fitting}, "
            f"or model.{shorter}"
        )
    limit = position_limit(backbone.get_decoder())
    lengths = {
        "training.max_target_tokens": recipe.training.max_target_tokens,
        "evaluation.max_new_tokens": recipe.evaluation.max_new_tokens,
    }
    needed = max(lengths.values())
    if limit is not None and needed > limit:
        remedy = " ".join(f"{key}={limit}" for key, length in lengths.items() if length > limit)
        raise UserError(
            f"model.backbone={name} has {limit} decoder positions, and texts take up to {needed}: set {remedy}"
        )


def encoder_positions(pose_encoder: PoseEncoder, frames: int) -> int:
    """Vectors that the pose encoder makes of a clip."""
    return frames if pose_encoder.kind == "linear" else -(-frames // pose_encoder.stride)
