"""Settings of a recipe that do not go together: errors, and notes on those that have no effect or surprise.

What can be seen only with a corpus is in ``toolkit/training/setting_notes.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import POSE_ENCODER_DEFAULTS, FeatureEncoder, Model, Quantization
from toolkit.recipe.tree import value_at

_DEFAULTS = Recipe(name="-", model=Model(backbone="-", quantization=Quantization(kind="int8"))).model_dump(mode="json")


def mismatches(recipe: Recipe) -> list[str]:
    """One note for each setting that is not read although it differs from its default, and for each that surprises."""
    given = recipe.model_dump(mode="json")
    notes = [
        f"{key}={value} has no effect: {reason}"
        for key, reason in _not_read(recipe)
        if (value := value_at(given, key)) not in (None, value_at(_DEFAULTS, key))
    ]
    if recipe.training.warmup_ratio == 1:
        notes.append("training.warmup_ratio=1.0 raises the learning rate to the last step: set a share such as 0.1")
    return notes


def ctc_problems(recipe: Recipe) -> Iterator[UserError]:
    """What asks a CTC head for what it does not read."""
    training, evaluation = recipe.training, recipe.evaluation
    if evaluation.ctc_weight > 0 and training.ctc_weight == 0:
        yield UserError(
            f"evaluation.ctc_weight={evaluation.ctc_weight} needs a CTC head, and training.ctc_weight=0 trains none",
            "set training.ctc_weight=0.3 or evaluation.ctc_weight=0",
        )
    elif evaluation.ctc_weight > 0 and training.ctc_target == "gloss":
        yield UserError(
            f"evaluation.ctc_weight={evaluation.ctc_weight} scores the tokens of a text, and with "
            "training.ctc_target=gloss the CTC head reads glosses",
            "set evaluation.ctc_weight=0 or training.ctc_target=text",
        )
    if evaluation.select_by == "gloss_wer" and (training.ctc_target != "gloss" or training.ctc_weight == 0):
        yield UserError(
            "evaluation.select_by=gloss_wer needs a CTC head that reads glosses",
            "set training.ctc_target=gloss training.ctc_weight=0.3, or another evaluation.select_by",
        )


def _not_read(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that this recipe's other settings turn off, and the reason."""
    if recipe.data.source == "demo":
        yield from ((f"data.{key}", "data.source=demo makes its own clips") for key in ("table", "poses", "features"))
    encoder = recipe.model.pose_encoder.kind
    for key in sorted({"layers", "kernel", "stride", "heads"} - set(POSE_ENCODER_DEFAULTS[encoder])):
        yield f"model.pose_encoder.{key}", f"a {encoder} pose encoder does not read it"
    if encoder != "linear":
        yield "model.pose_encoder.projection", f"a {encoder} pose encoder does not read it"
    if not recipe.data.features and not recipe.data.corpus:
        # Dropout is left out: --overfit turns it off wherever it may be.
        of_encoder = (f"model.feature_encoder.{key}" for key in FeatureEncoder.model_fields if key != "dropout")
        for key in ("data.features_fps", "model.fusion", "augmentation.feature_mask", *of_encoder):
            yield key, "data.features names none"
    if not recipe.training.ctc_weight:
        yield "training.ctc_target", "training.ctc_weight=0 trains no CTC head"
    if recipe.model.init_from is None:
        yield "model.init_parts", "model.init_from names no model"
    if recipe.model.quantization and recipe.model.quantization.kind == "int8":
        yield from (
            (f"model.quantization.{key}", "nf4 alone has it") for key in ("double_quantization", "compute_dtype")
        )
    optimizer = recipe.training.optimizer
    if optimizer in ("adafactor", "lion"):
        yield "training.eps", f"training.optimizer={optimizer} has no such constant"
    if optimizer == "adafactor":
        yield "training.betas", f"training.optimizer={optimizer} has none"
    if recipe.evaluation.num_beams == 1:
        yield "evaluation.length_penalty", "evaluation.num_beams=1 compares no hypotheses"
    if recipe.tracking.wandb == "off":
        yield "tracking.project", "tracking.wandb is off"
