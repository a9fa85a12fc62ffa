"""launch/recipes.py as a user runs it: its output, its JSON, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.models.warm_start.makers import HANDS, SMALL, corpus_of, make, save
from tests.scripts import run_main
from tests.written_mixes import write_three
from toolkit.recipe.paths import recipes_dir

COMMAND = Path(__file__).parents[2] / "launch" / "recipes.py"


def recipes(*arguments, cwd):
    return run_main("launch/recipes.py", *arguments, cwd=cwd)


RECIPES = {
    *("t5_small", "t5_base", "t5_large", "t5_3b", "t5_3b_lora", "t5_3b_lora_int8", "t5_3b_qlora", "t5_large_qlora"),
    *("flan_t5_base", "byt5_small", "bart_large", "mbart50", "mt5_base", "mt5_large", "umt5_base", "m2m100"),
    *("nllb_600m", "pegasus_large", "transformer", "demo", "mt5_base_unisign", "t5_small_24fps"),
    *("qwen2_5_0_5b", "qwen2_5_7b_lora", "qwen2_5_7b_qlora", "qwen2_5_14b_qlora", "llama3_1_8b_qlora"),
    *("mistral_7b_qlora", "gemma_7b_lora", "t5gemma_2b_lora"),
}


def test_ls_prints_one_row_a_recipe(tmp_path):
    done = subprocess.run([sys.executable, str(COMMAND), "ls"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heading, *rows = done.stdout.splitlines()
    assert heading.split() == ["recipe", "model", "parameters", "trains", "deepspeed", "description"]
    t5_small = next(row for row in rows if row.startswith("t5_small"))
    assert "60.5 M  all" in t5_small and "zero1" in t5_small
    assert "LoRA r=16 on nf4" in next(row for row in rows if row.startswith("t5_3b_qlora"))
    assert len({row.index(" zero") for row in rows}) == 1, "the columns stand under each other"


def test_ls_with_memory_counts_what_trains(tmp_path):
    done = recipes("ls", "--memory", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heading, *rows = done.stdout.splitlines()
    assert heading.split()[-3:] == ["trainable", "states", "description"]
    lora = next(row for row in rows if row.startswith("t5_3b_lora "))
    assert "2,851.6 M" in lora and "11.8 M" in lora


def test_ls_json(tmp_path):
    plain = {row["name"]: row for row in json.loads(recipes("ls", "--json", cwd=tmp_path).stdout)["recipes"]}
    done = recipes("ls", "--memory", "--json", cwd=tmp_path)
    listed = {row["name"]: row for row in json.loads(done.stdout)["recipes"]}
    assert set(listed) == set(plain) >= RECIPES
    assert listed["t5_small"]["parameters"] == listed["t5_small"]["trainable"] == 60_506_624
    assert listed["t5_small"]["deepspeed"] == "zero1"
    assert listed["t5_3b_lora"]["trainable"] == 144 * 16 * (1024 + 4096)
    for name in RECIPES:
        assert plain[name].items() <= listed[name].items()
        assert 0 < listed[name]["trainable"] <= listed[name]["parameters"]
        assert 0 < listed[name]["states_gib"] < 16, "a 24 GiB card keeps a third for activations"


def test_show_json_is_fully_resolved_and_overrides_stand_anywhere(tmp_path):
    done = recipes(
        "show", "t5_small", "training.epochs=3", "--ds", "zero3", "--json", "--world-size", "8",
        "ds.zero_optimization.stage3_max_live_parameters=1e8", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["recipe"]["training"]["epochs"] == 3
    assert shown["deepspeed"]["zero_optimization"]["stage3_max_live_parameters"] == 100_000_000
    assert (shown["world_size"], shown["accumulation_steps"], shown["zero_stage"]) == (8, 1, 3)


def test_show_prints_a_recipe_that_can_be_used_again(tmp_path):
    text = recipes("show", "demo", cwd=tmp_path).stdout
    recipe, _, deepspeed = text.partition("# DeepSpeed JSON")
    (tmp_path / "again.yaml").write_text(recipe)
    assert json.loads(deepspeed.partition("\n")[2])["train_batch_size"] > 0
    assert recipes("check", "again.yaml", cwd=tmp_path).returncode == 0


def test_check_says_what_would_run(tmp_path):
    done = recipes("check", "t5_small", "--ds", "zero3_offload", "--world-size", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "can run on 8 ranks",
        "60.5 M",
        "ZeRO stage 3",
        "optimizer states on cpu",
        "training.micro_batch_size=auto",
        "at most 16 clips fit GPUs of 24GiB",
        "data.table=",
    ):
        assert part in done.stdout
    given = recipes("check", "t5_small", "--world-size", "8", "training.micro_batch_size=16", cwd=tmp_path)
    assert "128 clips = 8 ranks x 1 micro-batch of 16" in given.stdout


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A small translator, as a run saves it."""
    folder = tmp_path_factory.mktemp("translator")
    return save(folder / "best", make(corpus_of(folder / "corpus", HANDS)))


def test_check_prints_what_a_translator_will_give(tmp_path, translator):
    arguments = ("check", "t5_small", *SMALL, f"model.init_from={translator}", "data.landmarks=unisign_69")
    (translator / "model.safetensors").rename(translator / "hidden")  # no weights are read
    done = recipes(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  init_from")]
    assert [line[1] for line in lines][:5] == ["pose_encoder", "encoder", "decoder", "embeddings", "ctc_head"]
    assert lines[0][2].isdigit() and lines[0][3:6] == ["landmarks", "by", "name,"]
    assert "384" in lines[3]
    assert any("confidence" in line for line in lines if line[1] == "note:")
    listed = json.loads(recipes(*arguments, "--json", cwd=tmp_path).stdout)["init_from"]
    assert [line.split()[0] for line in listed] == [line[1] for line in lines]
    trained = recipes(*arguments, "model.tokenizer=train", cwd=tmp_path)
    assert "when the run has its tokenizer" in trained.stdout
    (translator / "hidden").rename(translator / "model.safetensors")


def test_check_prints_what_an_epoch_draws_of_a_mix(tmp_path):
    write_three(tmp_path)
    listed = "data.corpora=[{corpus: large, weight: [1, 3]}, {corpus: small, weight: 1}]"
    done = recipes("check", "t5_small", "--cpu", listed, "data.epoch_clips=100", "training.epochs=10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "large: 40 clips, 52.4% of an epoch (1.31 passes), 74.4% at the end" in done.stdout
    assert "small: 6 clips, 47.6% of an epoch (7.94 passes), 25.6% at the end" in done.stdout
    assert "test signers in train of another corpus 6" in done.stdout
    refused = recipes("check", "t5_small", "--cpu", "data.corpora=[large, nothing]", cwd=tmp_path)
    assert refused.returncode == 2 and "nothing" in refused.stderr
    other = recipes(
        "check",
        "t5_small",
        "--cpu",
        "data.corpora=[small, synthetic]",
        "evaluation.select_corpus=synthetic",
        cwd=tmp_path,
    )
    assert other.returncode == 2 and "synthetic" in other.stderr


def test_check_refuses_a_translator_that_does_not_fit(tmp_path, translator):
    done = recipes("check", "t5_small", *SMALL, f"model.init_from={translator}", "model.tiny=false", cwd=tmp_path)
    assert done.returncode == 2
    assert "64" in done.stderr and "512" in done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["check", "t5_small", "model.init_parts=[]", "model.init_from=a"], "model: init_parts"),
        (["check", "t5_small", "model.init_parts=[head]"], "model.init_parts.0='head'"),
        (["check", "t5_small", "model.init_from=runs/none"], "runs/none"),
        (["check", "t5_small", "--world-size", "129"], "training.global_batch_size=129"),
        (["check", "t5_small", "ds.fp16.enabled=true"], "NaN in fp16"),
        (["check", "t5_small", "data.landmarks=unisign_96"], "unisign_69"),
        (["show", "t5_smal"], "did you mean t5_small?"),
        (["show", "t5_small", "--ds", "zero9"], "'zero9'"),
        (["show", "t5_small", "training.epoch=3"], "did you mean training.epochs?"),
        (["check", "t5_3b_lora_int8", "--ds", "zero3"], "int8 and ZeRO stage 3 exclude each other"),
        (["check", "t5_3b_lora_int8", "--ds", "zero3"], "--ds zero2, or"),
        (["cp", "t5_small", "t5_small"], "t5_small.yaml"),
        (["cp", "t5_small", "a b"], "'a b'"),
    ],
)
def test_wrong_input_is_an_error_with_a_hint_and_exit_code_2(tmp_path, arguments, part, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a hub that cannot be reached is asked again and again
    done = recipes(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert done.stdout == ""


def test_wrong_usage_is_exit_code_2(tmp_path):
    for arguments in ([], ["ls", "extra"], ["show", "demo", "--bogus"], ["bogus"]):
        done = recipes(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "usage:" in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in recipes("show", "--debug", "t5_smal", cwd=tmp_path).stderr


def test_cp_makes_a_recipe_of_your_own(tmp_path):
    done = recipes("cp", "t5_small", "mine/first.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "mine" / "first.yaml").read_text()
    assert "--recipe mine/first.yaml" in text and "--recipe t5_small" not in text
    assert text.count("\n") == (recipes_dir() / "t5_small.yaml").read_text().count("\n")
    checked = json.loads(recipes("check", "mine/first.yaml", "--json", cwd=tmp_path).stdout)
    assert checked["ok"] and checked["recipe"]["name"] == "first"
    assert not list((tmp_path / "mine").glob(".*"))


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder that holds a configuration and no weights."""

    def make(**config):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return str(tmp_path / "model")

    return make


def test_check_model_says_what_it_takes(tmp_path, folder):
    sizes = {"d_model": 256, "encoder_layers": 4, "decoder_layers": 4, "max_position_embeddings": 512}
    name = folder(model_type="bart", vocab_size=5000, **sizes)
    done = recipes("check-model", name, "--json", "--card-gib", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["architecture"], found["hidden_size"], found["inputs_embeds"]) == ("bart", 256, True)
    assert found["tested"] and found["encoder_positions"] == 512
    assert found["lora_targets"] == ["q_proj", "v_proj"]
    ways = {(way["name"], way["deepspeed"]): way for way in found["ways"]}
    assert ways["every weight", "zero2"]["trainable"] == found["parameters"]
    # 4 attentions of the encoder and 8 of the decoder, queries and values, rank 16.
    assert ways["LoRA", "zero2"]["trainable"] == 12 * 2 * 16 * (256 + 256)
    assert ("LoRA on int8", "zero3") not in ways and ("LoRA on NF4", "zero3") in ways
    text = recipes("check-model", name, cwd=tmp_path).stdout
    assert "can be trained behind poses" in text and "q_proj, v_proj" in text


def test_check_model_needs_no_hub_for_a_model_that_has_a_card(tmp_path):
    done = recipes("check-model", "Qwen/Qwen2.5-7B", "--json", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert (found["backbone"], found["parameters"], found["tested"]) == ("Qwen/Qwen2.5-7B", 7_615_616_512, True)
    on_nf4 = next(way for way in found["ways"] if (way["name"], way["deepspeed"]) == ("LoRA on NF4", "zero2"))
    assert on_nf4["fits"] and 4 < on_nf4["device_gib"] < 8


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "nothing_known"}, "model"),
    ],
)
def test_check_model_refuses_in_one_line(tmp_path, folder, config, part):
    done = recipes("check-model", folder(**config), cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and part in errors[0]


@pytest.mark.parametrize("number", [("--world-size", "0"), ("--card-gib", "0"), ("--card-gib", "nan")])
def test_check_model_wants_gpus_with_memory(tmp_path, number):
    done = recipes("check-model", "t5_small", *number, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert " ".join(number) in done.stderr


def test_check_model_names_a_folder_that_is_not_there(tmp_path):
    done = recipes("check-model", str(tmp_path / "nowhere"), cwd=tmp_path)
    assert done.returncode == 2
    error, hint = (line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:")))
    assert str(tmp_path / "nowhere") in error and "folder" in error and "check-model" not in hint


def test_check_shows_the_memory_that_a_recipe_takes(tmp_path):
    done = recipes("check", "t5_3b", "--world-size", "8", cwd=tmp_path)
    assert "by arithmetic" in done.stdout and "GiB of host memory a rank" in done.stdout
