"""Older spellings of a DeepSpeed JSON are translated to what DeepSpeed does with them before the rules read them."""

from __future__ import annotations

import json

import pytest

from toolkit.errors import UserError
from toolkit.recipe.deepspeed.json_file import read_deepspeed
from toolkit.recipe.resolve import resolve_named


def resolved(path, *overrides):
    return resolve_named("t5_small", overrides, 1, has_gpu=False, ds=str(path), needs_data=False)


def write(folder, zero, **more):
    path = folder / "z.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero, **more}), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["cpu_offload_param", "cpu_offload_params"])
def test_the_flags_of_offloading_become_sections(tmp_path, name):
    flags = {"cpu_offload": True, name: True, "cpu_offload_use_pin_memory": False}
    run = resolved(write(tmp_path, {"stage": 3, **flags}))
    zero = run.deepspeed["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert not flags.keys() & zero.keys()
    assert any("cpu_offload=true is read as zero_optimization.offload_optimizer.device=cpu" in n for n in run.notes)
    # Where states are offloaded, AdamW is DeepSpeed's for CPUs: a rule that the flag used to bypass.
    assert "fused" not in run.deepspeed["optimizer"]["params"]


def test_the_rules_of_offloading_hold_for_flags(tmp_path):
    with pytest.raises(UserError, match="ZeRO stage 3, not by stage 2"):
        resolved(write(tmp_path, {"stage": 2, "cpu_offload_param": True}))
    with pytest.raises(UserError, match=r"adamw8bit .* zero_optimization\.offload_optimizer"):
        resolved(write(tmp_path, {"stage": 2, "cpu_offload": True}), "training.optimizer=adamw8bit")


def test_a_flag_that_is_off_is_nothing(tmp_path):
    both = {"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "cpu"}}
    run = resolved(write(tmp_path, both))
    assert run.deepspeed["zero_optimization"]["offload_optimizer"] == {"device": "cpu"} and not run.notes


def test_flag_and_section_together_are_an_error_with_a_way_out(tmp_path):
    path = write(tmp_path, {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}})
    with pytest.raises(UserError) as caught:
        resolved(path)
    way = "ds.zero_optimization.cpu_offload=null"
    assert "zero_optimization.cpu_offload=true and zero_optimization.offload_optimizer" in caught.value.message
    assert caught.value.hint == f"set {way}"
    assert resolved(path, way).zero_stage == 2


def test_a_flag_of_the_wrong_type_is_named(tmp_path):
    with pytest.raises(UserError, match="cpu_offload='yes'"):
        resolved(write(tmp_path, {"stage": 2, "cpu_offload": "yes"}))


def test_pinning_without_anything_to_pin_is_reported(tmp_path):
    (note,) = resolved(write(tmp_path, {"stage": 2, "cpu_offload_use_pin_memory": True})).notes
    assert "cpu_offload_use_pin_memory has no effect: write offload_optimizer.pin_memory" in note


def test_bfloat16_and_the_flag_zero_optimization(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"bfloat16": {"enabled": true}, "zero_optimization": true}', encoding="utf-8")
    run = resolved(path)
    assert (run.precision, run.zero_stage) == ("bf16", 1)
    assert "bf16" in run.deepspeed and "bfloat16" not in run.deepspeed
    assert any("zero_optimization=true is read as zero_optimization.stage=1" in note for note in run.notes)
    problems = read_deepspeed(str(path), {"bf16": {"enabled": False}}).problems
    assert any("bfloat16" in problem.message and problem.hint == "set ds.bfloat16=null" for problem in problems)
