"""Recipes: inheritance, wrong keys and values all at once, and what is said about a recipe that is not there."""

from __future__ import annotations

import re

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe, recipe_keys, recipe_names
from toolkit.recipe.paths import recipes_dir
from toolkit.recipe.yaml_text import parse_yaml


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def message_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_recipe(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_recipes_load():
    assert {"demo", "t5_small"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description


def test_shipped_recipes_open_with_their_command_and_comment_every_line():
    for path in recipes_dir().glob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("#")
        if not path.stem.startswith("_"):
            assert any(f"--recipe {path.stem}" in line for line in lines[:8]), path
        for number, line in enumerate(lines, start=1):
            key, _, value = line.partition(":")
            is_setting = value.strip() and not line.lstrip().startswith("#")
            if is_setting and key.strip() not in ("description", "extends"):
                assert "#" in value, f"{path.name} line {number} has no comment: {line}"


def test_the_isign_parent_names_every_key_that_it_can():
    parent, _ = parse_yaml((recipes_dir() / "_isign.yaml").read_text(encoding="utf-8"), "_isign")
    for section in ("training", "augmentation", "evaluation", "tracking", "run"):
        wanted = {key.split(".", 1)[1] for key in recipe_keys() if key.startswith(f"{section}.")}
        assert wanted == set(parent[section])


def test_a_recipe_by_path_extends_a_shipped_one_and_is_extended_by_overrides(tmp_path):
    path = write(
        tmp_path / "mine.yaml",
        "extends: t5_small\nds: {bf16: {enabled: false}}\ntraining:\n  epochs: 3\nmodel: {pose_encoder: linear}\n",
    )
    recipe = load_recipe(path, ["training.seed=7", "ds.zero_optimization.stage=1"], ds="zero3")
    assert recipe.name == "mine"
    assert recipe.description == ""
    assert (recipe.training.epochs, recipe.training.seed) == (3, 7)
    assert recipe.model.backbone == "t5_small"
    assert recipe.model.pose_encoder.kind == "linear"
    assert load_recipe(path, ["model.quantization=int8"]).model.quantization.kind == "int8"
    assert recipe.model.pose_encoder.hidden == 1024  # the parent leaves it to the kind
    assert recipe.ds == {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    assert recipe.deepspeed == "zero3"


def test_a_parent_beside_the_recipe_comes_before_a_shipped_one(tmp_path):
    write(tmp_path / "t5_small.yaml", "model: {backbone: demo, from_scratch: true}\n")
    recipe = load_recipe(write(tmp_path / "child.yaml", "extends: t5_small\n"))
    assert recipe.model.backbone == "demo"


def test_a_section_whose_keys_are_all_commented_out_changes_nothing(tmp_path):
    path = write(tmp_path / "r.yaml", "extends: t5_small\ntraining:\n  # epochs: 3\naugmentation:\n")
    assert load_recipe(path).training == load_recipe("t5_small").training


def test_lora_is_turned_on_by_any_of_its_keys_and_off_by_null(tmp_path):
    on = load_recipe("t5_small", ["model.lora.r=8"]).model.lora
    assert on is not None and (on.r, on.alpha, on.train) == (8, 32.0, [])
    path = write(tmp_path / "r.yaml", "extends: t5_small\nmodel: {lora: {r: 4, train: [layer_norms]}}\n")
    assert load_recipe(path, ["model.lora.dora=true"]).model.lora.model_dump(exclude_defaults=True) == {
        "r": 4,
        "dora": True,
        "train": ["layer_norms"],
    }
    assert load_recipe(path, ["model.lora=null"]).model.lora is None
    assert load_recipe("t5_small").model.lora is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.rank=8"], "model.lora.rank"),
        (["model.lora.r=0"], "model.lora.r=0"),
        (["model.lora.train=[norms]"], "layer_norms"),
        (["model.lora.r=8", "model.freeze=[encoder]"], "leave out freeze"),
        (["model.extra_tokens=['<a>', '<a>']"], "twice"),
    ],
)
def test_adapters_asked_for_wrongly_are_named(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("t5_small", overrides)


def test_w_and_b_off_is_a_word(tmp_path):
    path = write(tmp_path / "r.yaml", "extends: demo\ntracking: {wandb: off}\n")
    assert load_recipe(path).tracking.wandb == "off"
    assert load_recipe("demo", ["tracking.wandb=online"]).tracking.wandb == "online"


def test_everything_wrong_is_said_at_once_with_file_line_and_nearest_spelling(tmp_path):
    path = write(
        tmp_path / "mine.yaml",
        "extends: t5_small\n"
        "training:\n"
        "  epoch: 3\n"
        "  learning_rate: -1\n"
        "  schedule: triangle\n"
        "modle:\n"
        "  backbone: x\n"
        "num_beams: 3\n",
    )
    message = message_of(path, ["data.fps=fast", "model.tiny=perhaps", "nonsense", "training.seed=true"])
    for part in (
        "9 problems",
        "mine.yaml line 3: no key training.epoch; did you mean training.epochs?",
        "mine.yaml line 4: training.learning_rate=-1: must be greater than 0",
        "mine.yaml line 5: training.schedule='triangle': must be 'linear', 'cosine', 'constant' or 'inverse_sqrt'",
        "mine.yaml line 6: no key modle; did you mean model?",
        "mine.yaml line 8: no key num_beams; did you mean evaluation.num_beams?",
        "command line: data.fps='fast'",
        "command line: model.tiny='perhaps'",
        "command line: 'nonsense' is not key=value",
        "command line: training.seed=True: true and false are no value for this key",
    ):
        assert part in message, part


def test_a_value_where_a_section_belongs():
    assert "training=5: must be a section" in message_of("t5_small", ["training=5"])


def test_ranges_that_contradict_each_other():
    message = message_of("t5_small", ["data.dev_share=0.6", "data.test_share=0.5"])
    assert "leave nothing to train on" in message
    assert "min_frames 9 is greater than max_frames 4" in message_of(
        "t5_small", ["data.min_frames=9", "data.max_frames=4"]
    )


def test_a_missing_backbone_is_required(tmp_path):
    assert "model.backbone is required" in message_of(write(tmp_path / "r.yaml", "model: {tiny: true}\n"))


def test_a_recipe_that_does_not_exist_names_the_nearest_and_how_to_list_all():
    message = message_of("t5_smal")
    assert "did you mean t5_small?" in message
    assert "launch/recipes.py ls" in message
    assert "no such file" in message_of("nowhere/recipe.yaml")


def test_a_parent_that_does_not_exist(tmp_path):
    assert "'_isgin' does not exist" in message_of(write(tmp_path / "r.yaml", "extends: _isgin\n"))


def test_extends_in_a_circle_is_drawn(tmp_path):
    write(tmp_path / "a.yaml", "extends: b\n")
    write(tmp_path / "b.yaml", "extends: c\n")
    write(tmp_path / "c.yaml", "extends: a\n")
    assert "a -> b -> c -> a" in message_of(str(tmp_path / "a.yaml"))
    assert "circle: d -> d" in message_of(write(tmp_path / "d.yaml", "extends: d\n"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: [1, 2", "line 1, column 16: not YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("name: a\nname: b\n", "line 2: name stands on line 1 too"),
        ("extends: [a, b]\n", "line 1: extends takes the name or path of one recipe"),
        ("a: &x {b: *x}\n", "refers to what encloses it"),
        ("a: !!python/object:os.system {}\n", "not YAML"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, text, part):
    message = message_of(write(tmp_path / "r.yaml", text))
    assert part in message
    assert "r.yaml" in message


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert "must be UTF-8" in message_of(str(tmp_path / "r.yaml"))


def test_recipes_are_frozen_and_their_defaults_are_not_shared():
    recipe = load_recipe("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.epochs = 3
