"""Which optimizer goes with which DeepSpeed JSON, and its section in the resolved JSON."""

from __future__ import annotations

import pytest

from toolkit.errors import UserError
from toolkit.recipe.resolve import ResolvedRun, resolve_named


def run_of(optimizer: str, ds: str, *overrides: str) -> ResolvedRun:
    overrides = (f"training.optimizer={optimizer}", *overrides)
    return resolve_named("t5_small", overrides, 1, has_gpu=False, ds=ds, needs_data=False)


@pytest.mark.parametrize(
    ("optimizer", "ds", "named", "others"),
    [
        ("adamw", "zero2", "AdamW", {"betas": [0.9, 0.98], "eps": 1e-8, "torch_adam": True, "fused": True}),
        ("adamw", "zero2_offload", "AdamW", {"betas": [0.9, 0.98], "eps": 1e-8}),
        ("adamw8bit", "zero3", "AdamW8bit", {"betas": [0.9, 0.98], "eps": 1e-8}),
        ("lion", "zero1", "Lion", {"betas": [0.9, 0.98]}),
        ("adafactor", "zero0", "Adafactor", {}),
    ],
)
def test_the_resolved_json_shows_the_optimizer(optimizer: str, ds: str, named: str, others: dict[str, object]) -> None:
    section = run_of(optimizer, ds).deepspeed["optimizer"]
    assert section == {"type": named, "params": {"lr": 3e-4, "weight_decay": 0.01, **others}}


def test_deepspeed_gets_permission_for_optimizers_it_has_not_tested() -> None:
    assert run_of("adamw8bit", "zero2").deepspeed["zero_allow_untested_optimizer"] is True
    assert "zero_force_ds_cpu_optimizer" not in run_of("lion", "zero2").deepspeed
    assert run_of("lion", "zero2_offload").deepspeed["zero_force_ds_cpu_optimizer"] is False
    assert "zero_allow_untested_optimizer" not in run_of("adamw", "zero2").deepspeed


def test_muon_has_its_momentum_and_whole_gradients() -> None:
    config = run_of("muon", "zero3", "training.gradient_clipping=0").deepspeed
    assert config["optimizer"]["params"]["momentum"] == 0.95
    assert config["zero_optimization"]["reduce_scatter"] is False


@pytest.mark.parametrize(
    ("optimizer", "ds", "overrides", "named", "remedy"),
    [
        ("adafactor", "zero1", (), "ZeRO stage 0, not 1", "--ds zero0"),
        ("adamw8bit", "zero2_offload", (), "zero_optimization.offload_optimizer (cpu)", "training.optimizer=adamw"),
        ("adamw8bit", "zero3_offload", (), "offload_optimizer", "ds.zero_optimization.offload_optimizer=null"),
        (
            "lion",
            "zero3",
            ("ds.zero_optimization.offload_optimizer={device: nvme, nvme_path: /x}",),
            "nvme",
            "ds.zero_optimization.offload_optimizer.device=cpu",
        ),
        (
            "adamw",
            "zero3",
            ("ds.zero_optimization.offload_optimizer={device: nvme, nvme_path: /x}", "training.ema=0.9"),
            "training.ema=0.9",
            "training.ema=null",
        ),
        ("muon", "zero2", (), "ZeRO stage 2", "training.gradient_clipping=0"),
        ("muon", "zero1", ("training.gradient_clipping=0",), "ZeRO stage 1 with bf16", "--ds zero2"),
        (
            "muon",
            "zero3",
            ("training.gradient_clipping=0", "ds.zero_optimization.reduce_scatter=true"),
            "ZeRO stage 3",
            "ds.zero_optimization.reduce_scatter=false",
        ),
        (
            "lion",
            "zero2",
            ("ds.optimizer.params.torch_adam=true",),
            "optimizer.params.torch_adam",
            "ds.optimizer.params.torch_adam=null",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    optimizer: str, ds: str, overrides: tuple[str, ...], named: str, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_of(optimizer, ds, *overrides)
    assert "\n" not in caught.value.message
    assert named in caught.value.message and remedy in caught.value.hint


def test_eight_bits_on_a_cpu_come_with_a_note() -> None:
    assert any("made for GPUs" in note for note in run_of("adamw8bit", "zero2").notes)


@pytest.mark.parametrize(
    ("ds", "overrides", "reason", "way"),
    [
        (
            "zero1",
            ["ds.bf16.bf16_master_weights_and_grads=true", "ds.zero_optimization.stage=0", "ds.data_types=null"],
            "ZeRO stage 1, 2 or 3",
            ["ds.zero_optimization.stage=2", "ds.bf16.bf16_optimizer_states=true"],
        ),
        (
            "zero2",
            ["ds.bf16.bf16_optimizer_states=true"],
            "bf16.bf16_master_weights_and_grads=true",
            ["ds.bf16.bf16_master_weights_and_grads=true"],
        ),
        (
            "zero2",
            ["ds.bf16.bf16_master_weights_and_grads=true"],
            "bf16.bf16_master_weights_and_grads=true",
            ["ds.zero_optimization.offload_optimizer.device=cpu"],
        ),
        (
            "zero2_bf16_states",
            ["ds.zero_optimization.offload_optimizer.device=cpu"],
            "optimizer.params.fp32_optimizer_states=false",
            ["ds.optimizer.params.fp32_optimizer_states=false"],
        ),
    ],
)
def test_master_weights_in_16_bits_where_deepspeed_would_assert(
    ds: str, overrides: list[str], reason: str, way: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        run_of("adamw", ds, *overrides)
    assert reason in caught.value.message and way[0] in caught.value.hint
    assert run_of("adamw", ds, *overrides, *way).precision == "bf16"
