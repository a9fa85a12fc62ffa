"""Recipes: inheritance, wrong keys and values all at once, and recipes that do not exist."""

from __future__ import annotations

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe, recipe_keys, recipe_names
from toolkit.recipe.paths import recipes_dir
from toolkit.recipe.yaml_text import parse_yaml


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_recipe(*args, **kwargs)
    assert "\n" not in caught.value.message and "\n" not in caught.value.hint
    return caught.value


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
    ("overrides", "named", "remedy"),
    [
        (["model.lora.rank=8"], "model.lora.rank", ""),
        (["model.lora.r=0"], "model.lora.r=0", "equal to 1"),
        (["model.lora.train=[norms]"], "model.lora.train.0='norms'", "layer_norms"),
        (["model.lora.r=8", "model.freeze=[encoder]"], "freeze=['encoder']", "model.freeze=[]"),
        (["model.extra_tokens=['<a>', '<a>']"], "extra_tokens=['<a>', '<a>']", ""),
    ],
)
def test_wrong_settings_of_adapters_are_named(overrides, named, remedy):
    error = error_of("t5_small", overrides)
    assert named in error.message and remedy in error.hint


def test_w_and_b_off_is_a_word(tmp_path):
    path = write(tmp_path / "r.yaml", "extends: demo\ntracking: {wandb: off}\n")
    assert load_recipe(path).tracking.wandb == "off"
    assert load_recipe("demo", ["tracking.wandb=online"]).tracking.wandb == "online"


def test_everything_wrong_is_listed_at_once_with_file_line_and_nearest_spelling(tmp_path):
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
    error = error_of(path, ["data.fps=fast", "model.tiny=perhaps", "nonsense", "training.seed=true"])
    assert error.message.startswith("9 problems ") and "mine: (1) " in error.message
    for part in (
        "mine.yaml line 3: training.epoch ",
        "mine.yaml line 4: training.learning_rate=-1 ",
        "mine.yaml line 5: training.schedule='triangle' ",
        "mine.yaml line 6: modle ",
        "mine.yaml line 8: num_beams ",
        " data.fps='fast'",
        " model.tiny='perhaps'",
        " 'nonsense'",
        " training.seed=True",
    ):
        assert part in error.message, part
    for part in (
        " training.epochs?",
        "than 0",
        "'linear', 'cosine', 'constant' or 'inverse_sqrt'",
        " model?",
        " evaluation.num_beams?",
        "training.epochs=20",
    ):
        assert part in error.hint, part
    numbers = [f"({number}) " for number in range(1, 10)]
    assert all(number in error.message and number in error.hint for number in numbers)


def test_a_value_where_a_section_belongs():
    error = error_of("t5_small", ["training=5"])
    assert "training=5" in error.message and "training.KEY=VALUE" in error.hint


def test_ranges_that_contradict_each_other():
    shares = error_of("t5_small", ["data.dev_share=0.6", "data.test_share=0.5"])
    assert "dev_share 0.6 + test_share 0.5" in shares.message and "data.test_share" in shares.hint
    frames = error_of("t5_small", ["data.min_frames=9", "data.max_frames=4"])
    assert "min_frames 9" in frames.message and "max_frames 4" in frames.message


def test_a_missing_backbone_is_required(tmp_path):
    error = error_of(write(tmp_path / "r.yaml", "model: {tiny: true}\n"))
    assert "model.backbone" in error.message and error.hint == "set model.backbone"


def test_a_recipe_that_does_not_exist_names_the_nearest_and_how_to_list_all():
    error = error_of("t5_smal")
    assert "'t5_smal'" in error.message
    assert " t5_small?" in error.hint and "launch/recipes.py ls" in error.hint
    path = error_of("nowhere/recipe.yaml")
    assert "nowhere/recipe.yaml" in path.message and "launch/recipes.py ls" in path.hint


def test_a_parent_that_does_not_exist(tmp_path):
    assert "'_isgin'" in error_of(write(tmp_path / "r.yaml", "extends: _isgin\n")).message


def test_a_cycle_of_extends_is_shown(tmp_path):
    write(tmp_path / "a.yaml", "extends: b\n")
    write(tmp_path / "b.yaml", "extends: c\n")
    write(tmp_path / "c.yaml", "extends: a\n")
    assert "a -> b -> c -> a" in error_of(str(tmp_path / "a.yaml")).message
    assert ": d -> d" in error_of(write(tmp_path / "d.yaml", "extends: d\n")).message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: [1, 2", "r.yaml line 1, column 16"),
        ("- a\n- b\n", "r.yaml"),
        ("", "r.yaml"),
        ("name: a\nname: b\n", "r.yaml line 2: name "),
        ("extends: [a, b]\n", "r.yaml line 1: extends=['a', 'b']"),
        ("a: &x {b: *x}\n", "r.yaml"),
        ("a: &x [*x]\n", "r.yaml"),
        ("a: !!python/object:os.system {}\n", "r.yaml line 1"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, text, part):
    error = error_of(write(tmp_path / "r.yaml", text))
    assert part in error.message and error.hint


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert "r.yaml" in error_of(str(tmp_path / "r.yaml")).message


def test_recipes_are_frozen_and_their_defaults_are_not_shared():
    recipe = load_recipe("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.epochs = 3


@pytest.mark.parametrize("written", ["1e5", "1.10", "+5", ".5", "1e400", "2024", "-0"])
def test_a_text_stays_as_it_is_written(tmp_path, written):
    path = write(tmp_path / "r.yaml", f"extends: t5_small\nrun: {{dir: {written}}}\n")
    for recipe in (load_recipe(path), load_recipe("t5_small", [f"run.dir={written}"])):
        assert recipe.run.dir == written
    recipe = load_recipe(
        "t5_small",
        [
            f"data.columns={{uid: {written}}}",
            f"data.columns.text={written}",
            f"model.lora.targets=[q, {written}]",
            f"model.extra_tokens=[{written}]",
            f"ds.zero_optimization.offload_optimizer={{device: cpu, nvme_path: {written}}}",
            f"ds.csv_monitor.job_name={written}",
        ],
    )
    assert recipe.data.columns == {"uid": written, "text": written}
    assert recipe.model.lora.targets == ["q", written] and recipe.model.extra_tokens == [written]
    assert recipe.ds["zero_optimization"]["offload_optimizer"]["nvme_path"] == written
    assert recipe.ds["csv_monitor"]["job_name"] == written


def test_a_number_is_still_one_where_a_number_is_wanted():
    recipe = load_recipe("t5_small", ["data.fps=25", "ds.zero_optimization.reduce_bucket_size=1e5", "run.dir=null"])
    assert recipe.data.fps == 25.0 and recipe.ds["zero_optimization"]["reduce_bucket_size"] == 1e5
    assert recipe.run.dir is None
