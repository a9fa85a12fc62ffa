"""The resolver: batch arithmetic, one owner for each value, and every conflict at once before anything starts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipe.resolving import error_of, run_of, write
from toolkit.errors import UserError
from toolkit.recipe.deepspeed.cells import types_in_words
from toolkit.recipe.deepspeed.json_file import ds_config_names
from toolkit.recipe.deepspeed.keys import KNOWN, OWNED
from toolkit.recipe.load import load_recipe, recipe_keys, recipe_names
from toolkit.recipe.resolve import ResolvedRun, resolve, resolve_named
from toolkit.recipe.tree import merge, nested

ROOT = Path(__file__).parents[2]
# The key for which a JSON that needs a GPU host is refused on a CPU.
GPU_HOSTS = {
    "zero2_fp16": "fp16.enabled=true",
    "zero3_plus_plus": "zero_optimization.zero_quantized_gradients",
}
EVERYWHERE = [name for name in ds_config_names() if name not in GPU_HOSTS]


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("ds", EVERYWHERE)
def test_every_strategy_resolves_for_every_recipe(ds, world_size, has_gpu):
    for name in recipe_names():
        batch = ("training.global_batch_size=64", "training.micro_batch_size=8")
        if name == "t5_3b_lora_int8" and ds.startswith("zero3"):
            continue  # the compatibility table refuses it
        run = run_of(name, *batch, ds=ds, world_size=world_size, has_gpu=has_gpu)
        config = run.deepspeed
        assert '"auto"' not in json.dumps(config)
        assert config["train_batch_size"] == 64 == 8 * world_size * run.accumulation_steps
        assert config["train_micro_batch_size_per_gpu"] == run.micro_batch_size == 8
        assert config["gradient_accumulation_steps"] == run.accumulation_steps
        clips = bool(config["zero_optimization"]["stage"])  # at stage 0 the loop does
        assert config["gradient_clipping"] == (run.recipe.training.gradient_clipping if clips else 0.0)
        assert config["optimizer"]["params"]["lr"] == run.recipe.training.learning_rate
        assert "scheduler" not in config
        assert run.zero_stage == int(ds[4])
        assert run.run_dir == Path("runs") / name


def test_precision_is_the_jsons_and_a_recipe_may_lay_its_own_over_it():
    assert [run_of(ds=ds).precision for ds in ("zero0", "zero1", "zero2", "zero3")] == ["fp32", "bf16", "bf16", "bf16"]
    assert run_of(ds="zero0").autocast == "bfloat16"
    assert [types_in_words(run_of(ds=ds).deepspeed) for ds in ("zero0", "zero1")] == [
        "fp32 with bfloat16 autocast",
        "bf16",
    ]
    for ds in EVERYWHERE:
        demo = run_of("demo", ds=ds)
        assert (demo.precision, demo.autocast) == ("fp32", None)
        # DeepSpeed reads bf16_master_weights_and_grads even from a section that is switched off.
        assert not {"bf16", "torch_autocast"} & demo.deepspeed.keys()


@pytest.mark.parametrize(("ds", "key"), GPU_HOSTS.items())
def test_what_needs_a_gpu_host_is_refused_elsewhere(ds, key, tmp_path):
    # T5's family overflows in fp16, BART does not.
    write(tmp_path / "config.json", {"model_type": "bart"})
    arguments = ("t5_small", f"model.backbone={tmp_path}")
    assert key in error_of(*arguments, ds=ds, world_size=8).message
    assert run_of(*arguments, ds=ds, world_size=8, has_gpu=True).zero_stage == int(ds[4])


@pytest.mark.parametrize("world_size", [1, 2, 4, 12])
def test_parameters_kept_on_each_node_need_whole_nodes(world_size):
    error = error_of("t5_small", ds="zero3_plus_plus", world_size=world_size, has_gpu=True)
    assert "zero_hpz_partition_size=8" in error.message and f"{world_size} ranks" in error.message
    on_one_node = re.search(r"ds\.\S+=null", error.hint)
    assert on_one_node
    for remedy in (on_one_node[0], f"ds.zero_optimization.zero_hpz_partition_size={min(world_size, 4)}"):
        resolved = run_of("t5_small", remedy, ds="zero3_plus_plus", world_size=world_size, has_gpu=True)
        assert resolved.zero_stage == 3


def test_every_run_has_a_swap_folder_of_its_own(tmp_path):
    def folder(*overrides):
        zero = run_of("t5_small", *overrides, ds="zero3_nvme").deepspeed["zero_optimization"]
        return Path(zero["offload_optimizer"]["nvme_path"])

    assert folder(f"run.dir={tmp_path}/a") == tmp_path / "a" / "nvme_swap"
    disk = f"ds.zero_optimization.offload_optimizer.nvme_path={tmp_path}/disk"
    one, other = (folder(disk, f"run.dir={tmp_path}/{name}/run") for name in "ab")
    assert one.parent == other.parent == tmp_path / "disk"
    assert one != other
    assert one == folder(disk, f"run.dir={tmp_path}/a/run")


def test_adamw_is_torchs_own_unless_its_states_are_offloaded():
    params = run_of(ds="zero2").deepspeed["optimizer"]["params"]
    assert (params["torch_adam"], params["fused"]) == (True, True)
    for ds in ("zero2_offload", "zero3_offload"):
        assert not {"torch_adam", "fused"} & set(run_of(ds=ds).deepspeed["optimizer"]["params"])
    chosen = run_of("t5_small", "ds.optimizer.params.torch_adam=true", ds="zero2_offload").deepspeed["optimizer"]
    assert chosen["params"]["torch_adam"] is True
    deepspeeds = run_of("t5_small", "ds.optimizer.params.torch_adam=false").deepspeed["optimizer"]
    assert "fused" not in deepspeeds["params"]


def test_deepspeeds_timer_is_off_unless_the_json_says_otherwise(tmp_path):
    assert run_of().deepspeed["timers"] == {"throughput": {"enabled": False}}
    for timer, enabled in (({"enabled": True}, True), ({"synchronized": False}, False)):
        path = write(tmp_path / "z.json", {"zero_optimization": {"stage": 1}, "timers": {"throughput": timer}})
        assert run_of(ds=path).deepspeed["timers"] == {"throughput": {**timer, "enabled": enabled}}


def test_overlap_is_off_unless_the_json_says_otherwise(tmp_path):
    path = write(tmp_path / "z.json", {"zero_optimization": {"stage": 3}})
    assert run_of(ds=path).deepspeed["zero_optimization"]["overlap_comm"] is False
    path = write(tmp_path / "z.json", {"zero_optimization": {"stage": 3, "overlap_comm": True}})
    assert run_of(ds=path).deepspeed["zero_optimization"]["overlap_comm"] is True


def test_an_empty_json_is_stage_0_in_fp32(tmp_path):
    run = run_of(ds=write(tmp_path / "z.json", {}))
    assert (run.zero_stage, run.precision) == (0, "fp32")


@given(total=st.integers(1, 300), limit=st.integers(1, 40), world_size=st.integers(1, 40))
def test_any_number_of_ranks_up_to_the_clips_of_a_step_resolves(total, limit, world_size):
    recipe = load_recipe("demo", [f"training.global_batch_size={total}", f"training.micro_batch_size={limit}"])
    try:
        run = resolve(recipe, world_size, has_gpu=False)
    except UserError as error:
        assert total < world_size
        assert f"training.global_batch_size={total}" in error.message and f"{world_size} ranks" in error.message
        most, least = re.search(r"\b(\d+) ranks.* training.global_batch_size=(\d+)", error.hint).groups()
        assert (int(most), int(least)) == (total, world_size)
        return
    assert total >= world_size
    share = math.ceil(total / world_size)
    assert run.accumulation_steps == math.ceil(share / limit), "as few as the limit allows"
    assert run.micro_batch_size == math.ceil(share / run.accumulation_steps) <= limit, "as equal as possible"
    config = run.deepspeed
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * world_size
    assert config["train_batch_size"] == product >= total, "DeepSpeed asserts it"
    notes = [note for note in run.notes if note.startswith(f"training.micro_batch_size={limit} ")]
    equal = total == limit * run.accumulation_steps * world_size
    assert len(notes) == (not equal), "one note, where not all micro-batches are as large as the limit"
    assert all(note.endswith(run.batch) for note in notes)


def test_a_note_states_the_micro_batches_that_the_limit_led_to():
    sixteen = "training.micro_batch_size=16"
    assert run_of("t5_small", sixteen, world_size=8).notes == ()
    six = run_of("t5_small", sixteen, world_size=6)
    words = "128 clips = 6 ranks x 2 micro-batches of 10 or 11"
    assert six.notes == (f"training.micro_batch_size=16 is an upper limit: {words}",)
    assert (six.micro_batch_size, six.accumulation_steps) == (11, 2)
    budget = run_of("t5_small", sixteen, "training.micro_batch_frames=4000", world_size=6)
    assert budget.notes == ()
    assert budget.batch == "128 clips over 6 ranks, in micro-batches of at most 16 clips and 4000 frames"


@pytest.mark.parametrize(
    ("wanted", "on_cpu", "on_gpu"),
    [("auto", "longest", "ladder"), ("longest", "longest", "longest"), ("ladder", "ladder", "ladder")],
)
def test_batches_are_padded_to_few_lengths_on_gpus_or_where_the_recipe_asks_for_it(wanted, on_cpu, on_gpu):
    for has_gpu, padding in ((False, on_cpu), (True, on_gpu)):
        assert run_of("t5_small", f"training.padding={wanted}", has_gpu=has_gpu).padding == padding
    assert "training.padding" in error_of("t5_small", "training.padding=rungs").message


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 16, 32, 64])
def test_every_recipe_resolves_on_as_many_ranks_as_a_step_has_clips(world_size):
    for name in recipe_names():
        total = load_recipe(name).training.global_batch_size
        if total < world_size:
            assert f"at most {total} ranks" in error_of(name, world_size=world_size, has_gpu=True).hint
        else:
            assert run_of(name, world_size=world_size, has_gpu=True).world_size == world_size


def test_fewer_than_one_rank():
    error = error_of(world_size=0)
    assert "0 ranks" in error.message and "at least 1" in error.hint


@pytest.mark.parametrize("dotted", [key for key in OWNED if key not in ("scheduler", "optimizer.type")])
def test_a_value_that_both_give_names_both_places(tmp_path, dotted):
    config = 16
    for key in reversed(dotted.split(".")):
        config = {key: config}
    assert f"z.json: {dotted}=16 ({OWNED[dotted]})" in error_of(ds=write(tmp_path / "z.json", config)).message
    assert f"ds.{dotted}=16 ({OWNED[dotted]})" in error_of("t5_small", f"ds.{dotted}=16").message


def test_another_optimizer_or_schedule_in_the_json_is_a_conflict(tmp_path):
    path = write(tmp_path / "z.json", {"optimizer": {"type": "Lamb"}, "scheduler": {"params": {"warmup_max_lr": 1e-3}}})
    message = error_of(ds=path).message
    assert 'z.json: optimizer.type="Lamb" (training.optimizer), ' in message
    assert 'scheduler={"params.warmup_max_lr": 0.001} (training.schedule and training.warmup_ratio)' in message
    assert not re.match(r"\d+ problems", message)  # one problem for all values of a place


def test_the_adam_of_a_json_from_elsewhere_is_adamw(tmp_path):
    """DeepSpeed's "Adam" decouples the decay unless adam_w_mode is false."""
    params = {"lr": "auto", "adam_w_mode": True, "bias_correction": True}
    path = write(tmp_path / "z.json", {"optimizer": {"type": "Adam", "params": params}})
    assert run_of(ds=path).deepspeed["optimizer"]["type"] == "AdamW"
    assert "adam_w_mode" in error_of("t5_small", "ds.optimizer.params.adam_w_mode=false", ds=path).message


def test_auto_gives_way_to_the_recipe(tmp_path):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2},
    }
    run = run_of(ds=write(tmp_path / "hf.json", config), world_size=2)
    assert '"auto"' not in json.dumps(run.deepspeed)
    assert run.deepspeed["train_batch_size"] == 128
    assert run.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.98]
    assert any("training.schedule=linear" in note for note in run.notes)


def test_auto_elsewhere_is_replaced_by_an_override(tmp_path):
    path = write(tmp_path / "hf.json", {"bf16": {"enabled": "auto"}, "optimizer": {"params": {"fused": "auto"}}})
    assert 'bf16.enabled, optimizer.params.fused are "auto"' in error_of(ds=path).message
    assert run_of("t5_small", "ds.bf16.enabled=true", "ds.optimizer=null", ds=path).precision == "bf16"


def test_fp16_is_refused_for_t5_with_the_reason(tmp_path):
    path = write(tmp_path / "z.json", {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    error = error_of(ds=path, has_gpu=True)
    assert "t5" in error.message and "fp16" in error.message and "ds.bf16.enabled=true" in error.hint
    half = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    assert "NaN in fp16" in error_of(ds=write(tmp_path / "h.json", half), has_gpu=True).message
    folder = tmp_path / "local_t5"
    folder.mkdir()
    write(folder / "config.json", {"model_type": "mt5"})
    assert "mt5" in error_of("t5_small", f"model.backbone={folder}", ds=path, has_gpu=True).message
    write(folder / "config.json", {"model_type": "bart"})
    assert run_of("t5_small", f"model.backbone={folder}", ds=path, has_gpu=True).precision == "fp16"
    assert "fp16.enabled=true" in error_of("t5_small", f"model.backbone={folder}", ds=path, has_gpu=False).message


def test_recipe_and_json_problems_are_listed_together():
    error = error_of("t5_small", "training.epoch=3", "ds.gradient_cliping=1", "model.tinny=true", ds="zero2")
    assert error.message.startswith("3 problems ")
    for part in ("training.epochs?", "gradient_clipping?", "model.tiny?"):
        assert f" {part}" in error.hint


def test_conflicts_of_every_kind_are_listed_together():
    error = error_of(
        "t5_small",
        "training.global_batch_size=1",
        "ds.train_batch_size=4",
        "ds.gradient_cliping=1",
        "ds.fp16.enabled=true",
        "model.tokenizer=bytes",
        world_size=2,
        needs_data=True,
    )
    for part in (
        "training.global_batch_size=1",
        "recipe t5_small ",
        "google-t5/t5-small",
        "ds.gradient_cliping",
        "ds.train_batch_size=4 (training.global_batch_size)",
        "bf16 and fp16",
        "NaN in fp16",
        "fp16.enabled=true needs a GPU",
    ):
        assert part in error.message, part
    for part in ("data.table=FILE.csv data.poses=FOLDER", " gradient_clipping?", "model.from_scratch=true"):
        assert part in error.hint, part


def paths_of(known, path=()):
    for key, kind in known.items():
        if isinstance(kind, dict):
            yield from paths_of(kind, (*path, key))
        yield (*path, key)


ANYTHING = st.sampled_from([None, True, 0, 1, -1, 2.5, 1e8, math.inf, "auto", "x", "cpu", "nvme", [], {}, {"a": 1}, 3])


@given(
    st.dictionaries(st.sampled_from(sorted(paths_of(KNOWN))), ANYTHING, max_size=4), st.sampled_from(ds_config_names())
)
def test_whatever_is_laid_over_a_json_it_resolves_or_is_refused_in_one_line(settings, ds):
    recipe = load_recipe("demo", ds=ds)
    over = dict(recipe.ds)
    for path, value in settings.items():
        over = merge(over, nested(path, value))
    try:
        run = resolve(recipe.model_copy(update={"ds": over}), 2, has_gpu=False)
    except UserError as error:
        assert "\n" not in error.message and error.hint
    else:
        assert "Infinity" not in json.dumps(run.deepspeed)
        assert run.deepspeed["train_batch_size"] == recipe.training.global_batch_size


@given(st.dictionaries(st.sampled_from(recipe_keys()), ANYTHING, max_size=5))
def test_whatever_is_put_into_a_recipe_it_resolves_or_is_refused_in_one_line(settings):
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value != math.inf]
    try:
        run_of("demo", *overrides, world_size=2, needs_data=True)
    except UserError as error:
        assert "\n" not in error.message and error.hint


def test_a_ctc_head_must_be_trained_before_it_can_score():
    error = error_of("t5_small", "evaluation.ctc_weight=0.3")
    assert "evaluation.ctc_weight=0.3" in error.message and "training.ctc_weight=0.3" in error.hint
    run = run_of("t5_small", "evaluation.ctc_weight=0.3", "training.ctc_weight=0.3")
    assert run.recipe.evaluation.ctc_weight == 0.3


def test_a_quantised_backbone_needs_an_adapter_and_the_storage_of_the_run():
    assert run_of("t5_small", "model.quantization=nf4", "model.lora.r=4").recipe.model.quantization.kind == "nf4"
    error = error_of("t5_small", "model.quantization=int8")
    assert "int8" in error.message and "model.lora.r=16" in error.hint
    nf4 = ("model.quantization=nf4", "model.lora.r=4", "model.quantization.storage_dtype=fp32")
    assert "model.quantization.storage_dtype=fp32" in error_of("t5_small", *nf4).message
    run_of("t5_small", *nf4, "ds.bf16.enabled=false", "ds.data_types=null")


def test_where_the_clips_are():
    assert run_of("demo", needs_data=True)
    assert run_of("t5_small", "data.table=T.csv", "data.poses=P", needs_data=True)
    assert run_of("t5_small", "data.corpus=C", needs_data=True)
    assert "data.poses=FOLDER" in error_of("t5_small", "data.table=T.csv", needs_data=True).hint
    both = error_of("t5_small", "data.table=T.csv", "data.corpus=C", needs_data=True)
    assert "data.corpus and data.table" in both.message


def test_a_backbone_that_does_not_exist():
    assert " t5_small?" in error_of("t5_small", "model.backbone=t5_smal").hint
    assert error_of("t5_small", "model.backbone=demo").hint == "add model.from_scratch=true"


def test_a_run_is_loaded_from_its_directory(tmp_path):
    own = ("model.prefix=translate to English:", "training.micro_batch_size=16", "ds.zero_optimization.stage=1")
    run = run_of("t5_small", *own, ds="zero2", world_size=6)
    run.save(tmp_path / "deep" / "run")
    again = ResolvedRun.load(tmp_path / "deep" / "run")
    assert again.recipe == run.recipe
    assert again.deepspeed == run.deepspeed
    assert (again.world_size, again.micro_batch_size, again.accumulation_steps) == (6, 11, 2)
    assert again.run_dir == tmp_path / "deep" / "run"
    assert sorted(path.name for path in again.run_dir.iterdir()) == ["deepspeed.json", "recipe.yaml"]
    # The stored recipe is a recipe: it can be run again.
    assert (
        resolve_named(str(again.run_dir / "recipe.yaml"), [], 6, has_gpu=False, needs_data=False).deepspeed
        == run.deepspeed
    )


def test_a_broken_file_of_a_run_directory_is_named(tmp_path):
    run_of().save(tmp_path)
    (tmp_path / "deepspeed.json").write_text('{"train_batch')
    with pytest.raises(UserError, match=r"deepspeed\.json"):
        ResolvedRun.load(tmp_path)
    (tmp_path / "deepspeed.json").unlink()
    with pytest.raises(UserError, match=r"deepspeed\.json"):
        ResolvedRun.load(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        run_of().save(tmp_path / "file")


@pytest.mark.process
def test_resolving_imports_no_heavy_library():
    code = (
        "import sys; from toolkit.recipe.resolve import resolve_named; "
        "resolve_named('demo', [], 2, has_gpu=False); "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
