"""Settings of a recipe that do not go together, as notes: those that have no effect, and those that surprise.

What can be seen only with a corpus is in ``toolkit/training/setting_notes.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.recipe.schema import POSE_ENCODER_DEFAULTS, FeatureEncoder, Model, Quantization, Recipe
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
        of_encoder = (f"model.feature_encoder.{key}" for key in FeatureEncoder.model_fields)
        for key in ("data.features_fps", "model.fusion", "augmentation.feature_mask", *of_encoder):
            yield key, "data.features names none"
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
