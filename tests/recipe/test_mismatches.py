"""Settings of a recipe that do not go together get a note that names the key; shipped recipes get none."""

from __future__ import annotations

import pytest

from toolkit.recipe.load import load_recipe, recipe_names
from toolkit.recipe.mismatches import mismatches
from toolkit.training.overfit import overfit_overrides


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_has_none(name: str) -> None:
    assert mismatches(load_recipe(name)) == []


@pytest.mark.parametrize(
    ("recipe", "overrides", "named"),
    [
        ("t5_small", ["training.warmup_ratio=1"], "training.warmup_ratio=1.0"),
        ("demo", ["data.table=T.csv"], "data.table=T.csv"),
        ("demo", ["data.poses=P"], "data.poses=P"),
        ("t5_small", ["model.pose_encoder=linear", "model.pose_encoder.stride=4"], "model.pose_encoder.stride=4"),
        ("t5_small", ["model.pose_encoder.heads=8"], "model.pose_encoder.heads=8"),
        ("t5_small", ["model.pose_encoder.projection=single"], "model.pose_encoder.projection=single"),
        ("t5_3b_lora_int8", ["model.quantization.double_quantization=false"], "double_quantization=False"),
        ("t5_small", ["training.optimizer=lion", "training.eps=1e-6"], "training.eps=1e-06"),
        ("t5_small", ["training.optimizer=adafactor", "training.betas=[0.5, 0.9]"], "training.betas=[0.5, 0.9]"),
        ("t5_small", ["evaluation.num_beams=1", "evaluation.length_penalty=1"], "evaluation.length_penalty=1.0"),
        ("t5_small", ["tracking.project=mine"], "tracking.project=mine"),
    ],
)
def test_a_note_names_the_setting(recipe: str, overrides: list[str], named: str) -> None:
    (note,) = mismatches(load_recipe(recipe, overrides))
    assert named in note


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.from_scratch=true", "evaluation.no_repeat_ngram_size=0"],
        ["model.from_scratch=true", "model.tokenizer=train"],
        ["tracking.project=mine", "tracking.wandb=offline"],
        ["evaluation.num_beams=1"],
        ["training.optimizer=adafactor"],
        overfit_overrides(8, 1, "t5_small"),
    ],
)
def test_settings_that_are_read_get_no_note(overrides: list[str]) -> None:
    assert mismatches(load_recipe("t5_small", overrides)) == []
