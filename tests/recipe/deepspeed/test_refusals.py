"""Keys that DeepSpeed accepts and that do nothing here, or harm: refused with a remedy that works, or noted."""

from __future__ import annotations

import json
import re

import pytest

from toolkit.errors import UserError
from toolkit.recipe.deepspeed import refusals as ds_refusals
from toolkit.recipe.deepspeed.json_file import ds_config_names, read_deepspeed
from toolkit.recipe.deepspeed.keys import KNOWN
from toolkit.recipe.deepspeed.refusals import IDLE, NVME, REFUSALS, STAGE_3, STAGES_1_AND_2, Refusal
from toolkit.recipe.resolve import resolve_named
from toolkit.recipe.tree import merge, nested, value_at

RANKS = 8
# Values that request something, where neither the opposite of the default nor a filled section does.
REQUESTS = {
    "checkpoint": {"tag_validation": "Fail"},
    "comet": {"enabled": True},
    "compile.passes": ["z3"],
    "compression_training": {"layer_reduction": {"enabled": True}},
    "data_types.keep_in_fp32_modules": ["wo"],
    "gradient_predivide_factor": 2.0,
    "sequence_parallel_size": 2,
    "wandb": {"enabled": True, "project": "mine"},
    "zero_optimization.mics_shard_size": 4,
    "zero_optimization.offload_optimizer.ratio": 0.5,
    "zero_optimization.zenflow": {"topk_ratio": 0.1, "update_interval": 4, "select_strategy": "step"},
}


def request(refusal: Refusal) -> object:
    if refusal.key in REQUESTS:
        return REQUESTS[refusal.key]
    kind: object = KNOWN
    for step in refusal.key.split("."):
        kind = kind.get(step) if isinstance(kind, dict) else None
    is_flag = kind == "bool" or refusal.key.startswith("optimizer.params.")
    return refusal.default is not True if is_flag else {"enabled": True}


def config_with(refusal: Refusal) -> dict:
    """A DeepSpeed JSON in which the key is refused."""
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    if refusal.when is ds_refusals._autocast:
        config = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 3}}
    if "offload_optimizer" in refusal.key:
        config["zero_optimization"] = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    return merge(config, nested(tuple(refusal.key.split(".")), request(refusal)))


@pytest.mark.parametrize("number", range(len(REFUSALS)), ids=[refusal.key for refusal in REFUSALS])
def test_a_refusal_names_key_reason_and_a_remedy_that_works(number, tmp_path, monkeypatch):
    refusal = REFUSALS[number]
    if refusal.when is ds_refusals._old_and_bf16:
        monkeypatch.setattr(ds_refusals, "_installed", lambda package: (0, 19, 5))
    path = tmp_path / "z.json"
    path.write_text(json.dumps(config_with(refusal)), encoding="utf-8")

    def resolved(*overrides: str, ds: str):
        return resolve_named("t5_small", overrides, RANKS, has_gpu=True, ds=ds, needs_data=False)

    with pytest.raises(UserError) as caught:
        resolved(ds=str(path))
    assert re.search(
        f"z.json: {re.escape(refusal.key)} .*: {re.escape(refusal.reason)}$", caught.value.message
    )  # the only problem
    way = re.search(r"(ds\.\S+=null)(?:.* use (.+))?$", caught.value.hint)
    assert way
    words = (way[2] or "").split()
    ds = words.pop(1) if words[:1] == ["--ds"] else str(path)
    overrides = [way[1], *(word for word in words if word != "--ds")]
    if refusal.when is ds_refusals._autocast:
        monkeypatch.undo()
    assert value_at(resolved(*overrides, ds=ds).deepspeed, refusal.key) is None


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.key)
def test_a_value_that_requests_nothing_is_removed(refusal):
    value = refusal.default if refusal.default is not None else {"enabled": False, "other": 1}
    for nothing in (None, value, {} if isinstance(value, dict) else value):
        over = nested(tuple(refusal.key.split(".")), nothing)
        read = read_deepspeed("zero1", over, world_size=RANKS)
        # A section where a flag belongs is a wrong type, which another test checks.
        assert not [problem for problem in read.problems if "refused" in problem.message]
        if refusal.when is None:
            assert value_at(read.config, refusal.key) in (None, {})


def test_deepcompile_is_refused_on_several_ranks_alone():
    compiled = {"compile": {"deepcompile": True}}
    assert not read_deepspeed("zero3", compiled).problems
    (problem,) = read_deepspeed("zero3", compiled, world_size=2).problems
    assert "DeepSpeed#7611" in problem.message and "--ds zero3" in problem.hint


def test_zero_plus_plus_in_bf16_needs_a_deepspeed_that_fixes_it(monkeypatch):
    assert not read_deepspeed("zero3_plus_plus").problems
    monkeypatch.setattr(ds_refusals, "_installed", lambda package: (0, 19, 5))
    problems = read_deepspeed("zero3_plus_plus").problems
    assert len(problems) == 2 and all("deepspeed>=0.19.6" in problem.message for problem in problems)
    half = {"bf16": {"enabled": False}, "fp16": {"enabled": True}}
    assert not read_deepspeed("zero3_plus_plus", half).problems


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: idle.key)
def test_an_idle_key_is_reported_and_removed(idle):
    value = {"vocabulary_size": 32_001, "seq_parallel_communication_data_type": "bf16"}.get(idle.key)
    if value is None:
        value = 0.5 if isinstance(idle.default, float) else idle.default is not True
    read = read_deepspeed("zero3_offload", nested(tuple(idle.key.split(".")), value))
    assert read.notes == [f"ds.{idle.key} has no effect: {idle.reason}"] and not read.problems
    assert value_at(read.config, idle.key) is None


def test_keys_of_another_stage_or_device_are_reported_in_one_line():
    read = read_deepspeed("zero3", {"zero_optimization": {"stage": 2, "round_robin_gradients": True}})
    (note,) = read.notes
    assert "sub_group_size, stage3_prefetch_bucket_size, " in note and note.endswith("have no effect at ZeRO stage 2")
    assert "round_robin_gradients" not in note
    offload = {"zero_optimization": {"offload_optimizer": {"buffer_count": 4, "fast_init": True}}}
    assert read_deepspeed("zero2_offload", offload).notes == [
        "ds.zero_optimization.offload_optimizer.buffer_count, fast_init have no effect without nvme"
    ]
    assert not read_deepspeed("zero3_nvme", offload).notes
    assert read_deepspeed("zero3", {"aio": {"block_size": 262_144}}).notes == ["ds.aio has no effect without nvme"]
    logged = {"steps_per_print": 10, "dump_state": True}
    assert read_deepspeed("zero2", logged).notes == [
        "ds.steps_per_print, dump_state have no effect without log_level=info, which logs into log.txt"
    ]
    assert not read_deepspeed("zero2", logged | {"log_level": "info"}).notes
    compiled = {"compile": {"double_buffer": True}}
    assert read_deepspeed("zero3", compiled).notes == [
        "ds.compile.double_buffer has no effect without compile.deepcompile"
    ]


@pytest.mark.parametrize("name", ds_config_names())
def test_a_shipped_json_says_nothing_that_is_refused_or_idle(name):
    read = read_deepspeed(name)
    assert not read.problems and not read.notes


def test_the_tables_name_keys_that_there_are():
    def known(dotted: str) -> bool:
        section: object = KNOWN
        for step in dotted.split("."):
            section = section.get(step) if isinstance(section, dict) else None
        return section is not None

    assert all(known(idle.key) for idle in IDLE)
    assert all(known(f"zero_optimization.{key}") for key in (*STAGE_3, *STAGES_1_AND_2))
    assert all(known(f"zero_optimization.{section}.{key}") for section, keys in NVME.items() for key in keys)
