"""Every DeepSpeed JSON trains on two ranks, saves and loads; in fp32 all agree, however the batch is divided."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker
from toolkit.cluster.ops import is_built
from toolkit.recipe.deepspeed.json_file import ds_config_names

STEPS = 4  # an epoch has three
GPU_HOSTS = ("zero2_fp16", "zero3_plus_plus")  # tests/recipe sees to it that they are refused here
CONFIGS = [name for name in ds_config_names() if name not in GPU_HOSTS]
NVME = [name for name in CONFIGS if name.endswith("nvme")]
# What is the same in fp32, where no states are kept in bf16 and nothing is computed in it, has one case for all of it.
IN_FP32 = [name for name in CONFIGS if not name.endswith(("bf16_states", "autocast"))]
FP32 = ["ds.bf16.enabled=false", "ds.torch_autocast.enabled=false", "ds.data_types=null"]
BF16 = ["ds.bf16.enabled=true", "ds.torch_autocast.enabled=false"]
AUTOCAST = ["ds.bf16.enabled=false", "ds.torch_autocast.enabled=true", "ds.torch_autocast.dtype=bfloat16"]
ENCODERS = ("linear", "conformer", "stgcn")  # conv is every other case's
# What `make test` trains of the lists above and below; the rest is trained by night.
ENCODERS_BY_DAY = ("conformer",)
FRAMES_BY_DAY = ("zero1", "zero3_offload")
LADDER_ON = ("zero0", "zero1", "zero2", "zero3")
VARIANTS_BY_DAY = ("muon", "ema", "freeze")
UNEVEN_BY_DAY = ("zero0", "zero2", "zero3")
USUAL_WIDTH = "model.pose_encoder.hidden=512"
UNCLIPPED = [*FP32, USUAL_WIDTH, "training.max_steps=1", "training.gradient_clipping=0"]
# What a run may do otherwise -> overrides, and the stages by which it must come out the same.
VARIANTS = {
    "lion": (["training.optimizer=lion", "training.learning_rate=3e-4"], ["zero0", "zero2_offload", "zero3"]),
    "muon": (["training.optimizer=muon", "training.gradient_clipping=0"], ["zero0", "zero2", "zero3_offload"]),
    "adafactor": (["training.optimizer=adafactor", "training.learning_rate=1e-2"], ["zero0"]),
    "adamw8bit": (["training.optimizer=adamw8bit"], ["zero0", "zero3"]),
    "ema": (["training.ema=0.5"], ["zero0", "zero3"]),
    "freeze": (["training.freeze_backbone_steps=2"], ["zero0", "zero2", "zero3_offload"]),
    # Keys of a DeepSpeed JSON that change how gradients are kept or sent, and not what they are.
    "aligned": (["ds.zero_optimization.parameter_alignment=true"], ["zero2"]),
    "prescaled": (["ds.prescale_gradients=true", "ds.zero_optimization.reduce_scatter=false"], ["zero1", "zero3"]),
}
# Compiled layers at the stages that can have them, and with what changes their graphs -> overrides, and the case that
# computes the same without.
COMPILED = {
    "zero0": (FP32, "fp32-zero1"),
    "zero1-checkpoints": ([*FP32, "training.gradient_checkpointing=true"], "fp32-zero1"),
    "zero1-freeze": ([*FP32, "training.freeze_backbone_steps=2"], "freeze-zero0"),
    "zero2": (FP32, "fp32-zero1"),
    "zero2-ema": ([*FP32, "training.ema=0.5"], "ema-zero0"),
    "zero2_offload": (FP32, "fp32-zero1"),
}
WAITS_BY_DAY = ("zero2", "zero3")
COMPILED_BY_DAY = ()  # two ranks that compile take half a minute
# Seven clips a step, three in the last one of an epoch: of two ranks one has four, of three ranks one has three.
UNEVEN = [*FP32, "training.global_batch_size=7"]
UNEVEN_ON = ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]
SMALL = "ds.zero_optimization.stage3_param_persistence_threshold=0"
# A step whose gradient is not finite: precision and JSON -> overrides.
SPOILED = {
    f"{precision}-{name}": [*extra, *([SMALL] if name == "zero3" else [])]
    for precision, extra in (("fp32", FP32), ("bf16", BF16))
    for name in ("zero0", "zero1", "zero2", "zero3")
}
SPOILED_BY_DAY = ("fp32-zero0", "fp32-zero1")
# A language model, whose sequences hold words, poses and text: JSON and overrides, with the losses of one rank.
LANGUAGE = [*FP32, "model.backbone=qwen2_5_0_5b", "model.prompt='Translate {poses} into English:'"]
DIVIDED = {
    "one-rank": ("zero1", ["training.micro_batch_size=8"]),
    "single-clips": ("zero0", ["training.micro_batch_size=1"]),
    "frames": ("zero2", ["training.micro_batch_size=4", "training.micro_batch_frames=400"]),
    "partitioned": ("zero3", [SMALL]),
    "checkpoints": ("zero2", ["training.gradient_checkpointing=true"]),
}
DIVIDED_BY_DAY = ("frames",)
# Losses of six steps in fp32, with a pose encoder of its usual width, kept so that a change that is not meant to be
# numeric shows when it is.
KEPT = [6.587661, 5.79697, 5.463105, 5.154235, 4.87713, 4.836038]


Start = Callable[[int, dict[str, Any]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def start(fork: Callable[..., Any], settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs cases on so many ranks, one after the other in one start; what each gave, by name."""
    folder = tmp_path_factory.mktemp("strategies")
    shared = [
        *prepared(settings),
        f"training.max_steps={STEPS}",
        "training.learning_rate=3e-3",
        "training.warmup_ratio=0",
        "training.epochs=9",
        "training.eval_every=99",
        "model.dropout=0",
        "model.pose_encoder.dropout=0",
        "training.ctc_weight=0.5",
    ]

    def start(ranks: int, group: dict[str, Any]) -> dict[str, Any]:
        return run_worker(
            fork, "tests/end_to_end/strategies_worker.py", folder, ranks=ranks, cases=group, settings=shared
        )

    return start


@pytest.fixture(scope="module")
def trained(start: Start, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What each case gave, by name."""
    night = is_night(request)
    here = [name for name in CONFIGS if name not in NVME or is_built("async_io")]
    stage3 = [name for name in here if name.startswith("zero3")]
    chosen = {
        f"{precision}-{name}": {"ds": name, "overrides": [*extra, *([SMALL] if name in stage3 else [])]}
        for precision, extra, names in (("own", [], CONFIGS), ("fp32", FP32, IN_FP32))
        for name in names
        if name in here
    }
    for kind in ENCODERS if night else ENCODERS_BY_DAY:
        encoder = [f"model.pose_encoder={kind}", "model.pose_encoder.hidden=32"]
        if kind != "linear":
            encoder.append("model.pose_encoder.layers=2")
        chosen[f"{kind}-whole"] = {"ds": "zero1", "overrides": [*FP32, *encoder]}
        chosen[f"{kind}-partitioned"] = {"ds": "zero3", "overrides": [*FP32, *encoder, SMALL]}
        chosen[f"{kind}-autocast"] = {"ds": "zero3", "overrides": [*AUTOCAST, *encoder, SMALL]}
    chosen["kept"] = {"ds": "zero1", "overrides": [*FP32, USUAL_WIDTH, f"training.max_steps={len(KEPT)}"]}
    for micro in (1, 4):
        chosen[f"micro-{micro}"] = {"ds": "zero1", "overrides": [*FP32, f"training.micro_batch_size={micro}"]}
    # Clips of 55 to 274 frames: a step needs two, three or four of these.
    budget = [*FP32, "training.micro_batch_size=4", "training.micro_batch_frames=400"]
    for name in IN_FP32 if night else FRAMES_BY_DAY:
        if name not in here:
            continue
        chosen[f"frames-{name}"] = {"ds": name, "overrides": [*budget, *([SMALL] if name in stage3 else [])]}
    for name in LADDER_ON:
        extra = ["training.padding=ladder", *([SMALL] if name in stage3 else [])]
        chosen[f"ladder-{name}"] = {"ds": name, "overrides": [*budget, *extra]}

    for name in COMPILED if night else COMPILED_BY_DAY:
        chosen[f"compiled-{name}"] = {
            "ds": name.split("-")[0],
            "overrides": [*COMPILED[name][0], "training.compile=true"],
        }
    for name in CONFIGS if night else WAITS_BY_DAY:
        if name in here:
            # torch's CTC loss takes lengths from the host.
            overrides = ["training.ctc_weight=0", *([SMALL] if name in stage3 else [])]
            chosen[f"waits-{name}"] = {"ds": name, "overrides": overrides, "waits": True}
    one_step = [*BF16, "training.max_steps=1", "training.warmup_ratio=0"]
    chosen |= {f"first-{name}": {"ds": name, "overrides": one_step, "moves": True} for name in ("zero0", "zero1")}
    chosen |= {name: case | {"gradients": True} for name, case in gradient_cases().items()}
    chosen |= optimizer_cases(VARIANTS if night else VARIANTS_BY_DAY)
    chosen |= {
        f"spoiled-{name}": {"ds": name.rpartition("-")[2], "overrides": SPOILED[name], "spoiled": 2}
        for name in (SPOILED if night else SPOILED_BY_DAY)
    }
    chosen |= {f"uneven-{ds}": uneven(ds) for ds in (UNEVEN_ON if night else UNEVEN_BY_DAY)}
    alone = {"gradients-alone": chosen["gradients-zero1"] | {"overrides": [*UNCLIPPED, "training.micro_batch_size=8"]}}
    alone["uneven-alone"] = uneven("zero1")
    for name, (ds, overrides) in DIVIDED.items():
        group = alone if name == "one-rank" else chosen
        if night or name in DIVIDED_BY_DAY or group is alone:
            group[f"language-{name}"] = {"ds": ds, "overrides": [*LANGUAGE, *overrides]}
    return {name: found for ranks, group in ((2, chosen), (1, alone)) for name, found in start(ranks, group).items()}


def uneven(ds: str) -> dict[str, Any]:
    """A global batch that ranks cannot share equally."""
    return {"ds": ds, "overrides": [*UNEVEN, *([SMALL] if ds == "zero3" else [])]}


def gradient_cases() -> dict[str, dict[str, Any]]:
    """One step each, not clipped, by every stage and micro-batch size."""
    found = {
        f"gradients-{ds}": {"ds": ds, "overrides": [*UNCLIPPED, *([SMALL] if ds == "zero3" else [])]}
        for ds in ("zero0", "zero1", "zero2", "zero3")
    }
    for micro in (1, 4):
        found[f"gradients-micro-{micro}"] = {
            "ds": "zero1",
            "overrides": [*UNCLIPPED, f"training.micro_batch_size={micro}"],
        }
    return found


def optimizer_cases(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Other optimisers, averaged weights and a backbone that waits, each by the stages that differ most."""
    return {
        f"{name}-{ds}": {"ds": ds, "overrides": [*FP32, *overrides, *([SMALL] if ds.startswith("zero3") else [])]}
        for name, (overrides, stages) in VARIANTS.items()
        if name in names
        for ds in stages
    }


def case_of(trained: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What a case gave; skipped where this machine cannot run it."""
    if name not in trained and name.endswith("nvme"):
        pytest.skip("op async_io is not built: apt-get install libaio-dev, python launch/doctor.py build-ops async_io")
    return trained[name]


@pytest.mark.parametrize("name", [*(f"own-{name}" for name in CONFIGS), *(f"fp32-{name}" for name in IN_FP32)])
def test_it_learns_saves_and_loads(trained: dict[str, dict[str, Any]], name: str) -> None:
    case = case_of(trained, name)
    assert len(case["losses"]) == STEPS
    assert case["losses"][-1] < case["losses"][0]
    assert all(norm is not None and norm > 0 for norm in case["grad_norms"])
    assert case["restored"]
    assert case["best_is_last"]


@pytest.mark.parametrize("name", IN_FP32)
def test_memory_strategies_change_nothing_in_fp32(trained: dict[str, dict[str, Any]], name: str) -> None:
    reference, case = trained["fp32-zero1"], case_of(trained, f"fp32-{name}")
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    # Each engine sums up the norm in its own order and, at stage 0, we do.
    assert case["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-3)
    assert case["weights_norm"] == pytest.approx(reference["weights_norm"], rel=1e-6)
    assert case["hypotheses"] == reference["hypotheses"]
    assert case["uids"] == reference["uids"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_strategys_own_precision_follows_fp32(trained: dict[str, dict[str, Any]], name: str) -> None:
    reference, case = trained["fp32-zero1"], case_of(trained, f"own-{name}")
    assert case["losses"] == pytest.approx(reference["losses"], rel=0.02)
    assert case["grad_norms"][0] == pytest.approx(reference["grad_norms"][0], rel=0.02), "a sum where a mean belongs?"


@pytest.mark.parametrize("name", cases(COMPILED, COMPILED_BY_DAY))
def test_compiled_layers_change_nothing(trained: dict[str, dict[str, Any]], name: str) -> None:
    case, reference = trained[f"compiled-{name}"], trained[COMPILED[name][1]]
    assert case["compiled_layers"], "it ran without them"
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert case["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-3)
    assert case["weights_norm"] == pytest.approx(reference["weights_norm"], rel=1e-5)
    # The best model of a run that averages its weights has the averages.
    assert case["restored"] and case["best_is_last"] == reference["best_is_last"] == ("ema" not in name)


@pytest.mark.parametrize("kind", cases(ENCODERS, ENCODERS_BY_DAY))
def test_pose_encoders_learn_alike_with_partitioned_weights(trained: dict[str, dict[str, Any]], kind: str) -> None:
    whole, partitioned, autocast = (trained[f"{kind}-{how}"] for how in ("whole", "partitioned", "autocast"))
    assert whole["losses"][-1] < whole["losses"][0]
    assert partitioned["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert partitioned["weights_norm"] == pytest.approx(whole["weights_norm"], rel=1e-6)
    assert partitioned["restored"] and partitioned["best_is_last"]
    assert autocast["losses"] == pytest.approx(whole["losses"], rel=0.05)


@pytest.mark.parametrize("micro", [1, 4])
def test_the_micro_batch_size_changes_nothing(trained: dict[str, dict[str, Any]], micro: int) -> None:
    reference, case = trained["fp32-zero1"], trained[f"micro-{micro}"]
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert case["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("name", cases(IN_FP32, FRAMES_BY_DAY))
def test_a_frame_budget_changes_nothing_but_the_micro_batches(trained: dict[str, dict[str, Any]], name: str) -> None:
    reference, case = trained["fp32-zero1"], case_of(trained, f"frames-{name}")
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert case["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-3)
    assert case["weights_norm"] == pytest.approx(reference["weights_norm"], rel=1e-6)
    assert len(set(case["micro_batches"])) > 1, "the number of micro-batches was to vary from step to step"
    assert case["restored"]


@pytest.mark.parametrize("name", LADDER_ON)
def test_a_frame_budget_on_a_ladder_changes_nothing_but_the_micro_batches(
    trained: dict[str, dict[str, Any]], name: str
) -> None:
    reference, case = trained["fp32-zero1"], trained[f"ladder-{name}"]
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert case["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-3)
    assert case["weights_norm"] == pytest.approx(reference["weights_norm"], rel=1e-6)
    assert len(set(case["micro_batches"])) > 1, "the number of micro-batches was to vary from step to step"
    assert set(case["frames"]) <= set(case["ladder"]) and not set(reference["frames"]) <= set(case["ladder"])
    assert case["restored"]


@pytest.mark.parametrize("name", cases(UNEVEN_ON, UNEVEN_BY_DAY))
def test_unequal_shares_change_nothing(trained: dict[str, dict[str, Any]], name: str) -> None:
    case = trained[f"uneven-{name}"]
    assert_as_alone(case, trained["uneven-alone"])
    assert case["micro_batches"] == [2, 2, 2, 1], "of at most two clips, as few as a step needs"
    assert case["restored"]


def test_a_first_step_in_bf16_at_stage_0_is_a_whole_one(trained: dict[str, dict[str, Any]]) -> None:
    """DeepSpeed steps once with zeros as it makes that optimizer: Adam's first step was 0.74 of one."""
    moved = [trained[f"first-{name}"]["moved"] for name in ("zero0", "zero1")]
    assert moved[0] == pytest.approx(moved[1], rel=0.02) and moved[1] > 0


@pytest.mark.parametrize("name", cases(SPOILED, SPOILED_BY_DAY))
def test_a_step_without_a_finite_gradient_changes_nothing_at_any_stage(
    trained: dict[str, dict[str, Any]], name: str
) -> None:
    case, reference = trained[f"spoiled-{name}"], trained["spoiled-fp32-zero1"]
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5 if name.startswith("fp32") else 0.02)
    assert case["losses"][0] == pytest.approx(trained["fp32-zero1"]["losses"][0], rel=0.02)
    assert [norm is None for norm in case["grad_norms"]] == [False, True, False, False], "null in metrics.jsonl"
    assert case["restored"] and case["best_is_last"]


@pytest.mark.nightly
def test_unequal_shares_change_nothing_on_three_ranks(start: Start) -> None:
    alone = start(1, {"three-alone": uneven("zero1")})["three-alone"]
    for name, case in start(3, {ds: uneven(ds) for ds in UNEVEN_ON}).items():
        assert_as_alone(case, alone)
        assert case["micro_batches"] == [2, 2, 2, 1], name


@pytest.mark.parametrize("name", cases([name for name in DIVIDED if name != "one-rank"], DIVIDED_BY_DAY))
def test_a_language_model_has_the_losses_of_one_rank(trained: dict[str, dict[str, Any]], name: str) -> None:
    case = trained[f"language-{name}"]
    assert_as_alone(case, trained["language-one-rank"])
    assert case["losses"][-1] < case["losses"][0] and case["restored"] and case["best_is_last"]


def assert_as_alone(case: dict[str, Any], alone: dict[str, Any]) -> None:
    assert case["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert case["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)
    assert case["weights_norm"] == pytest.approx(alone["weights_norm"], rel=1e-6)


def test_the_losses_are_the_recorded_ones(trained: dict[str, dict[str, Any]]) -> None:
    assert trained["kept"]["losses"] == pytest.approx(KEPT, rel=1e-4)


def test_gradients_are_the_same_at_all_stages_ranks_and_micro_batch_sizes(trained: dict[str, dict[str, Any]]) -> None:
    reference = trained["gradients-zero1"]["gradients"]
    assert len(reference) > 50
    others = [f"zero{stage}" for stage in (0, 2, 3)] + ["micro-1", "micro-4", "alone"]
    for other in others:
        found = trained[f"gradients-{other}"]["gradients"]
        assert found.keys() == reference.keys()
        for name, (norm, product) in reference.items():
            assert found[name][0] == pytest.approx(norm, rel=1e-5), (other, name)
            assert found[name][1] == pytest.approx(product, abs=2e-5 * norm), (other, name)


@pytest.mark.parametrize("name", cases(CONFIGS, WAITS_BY_DAY))
def test_the_host_waits_once_a_step_beside_deepspeeds_own_checks(trained: dict[str, dict[str, Any]], name: str) -> None:
    waits = case_of(trained, f"waits-{name}")["waits"]
    assert len(waits) == STEPS
    for step in waits:
        ours = {key: count for key, count in step.items() if not key.startswith(("deepspeed: ", "torch/optim: "))}
        assert sum(ours.values()) == 1, step
        assert not any(key.endswith(": synchronize") for key in step), "DeepSpeed's timer is off"


@pytest.mark.nightly
def test_a_step_at_stage_0_walks_through_the_model_once(trained: dict[str, dict[str, Any]]) -> None:
    """DeepSpeed does, for the gradients that ranks sum; not to forget them."""
    assert trained["waits-zero0"]["walks"] == [1] * STEPS


def test_gradients_are_joined_where_their_sums_are_in_fp32(trained: dict[str, dict[str, Any]]) -> None:
    joined = ("fp32-zero1", "fp32-zero2", "kept", "gradients-alone", "own-zero2_autocast", "own-zero2")
    others = ("fp32-zero0", "own-zero1", "fp32-zero2_offload", "muon-zero2", "fp32-zero3")
    assert {name: trained[name]["joins"] for name in (*joined, *others)} == {
        **dict.fromkeys(joined, True),
        **dict.fromkeys(others, False),
    }


@pytest.mark.parametrize("variant", cases(VARIANTS, VARIANTS_BY_DAY))
def test_variants_learn_and_save_alike_at_all_stages(trained: dict[str, dict[str, Any]], variant: str) -> None:
    stages = VARIANTS[variant][1]
    reference = trained[f"{variant}-{stages[0]}"]
    # Eight bits are rounded by blocks of what lies together, which depends on the stage.
    tolerance = 1e-3 if variant == "adamw8bit" else 1e-4
    for ds in stages:
        case = trained[f"{variant}-{ds}"]
        assert case["losses"] == pytest.approx(reference["losses"], rel=tolerance)
        assert case["restored"]
        assert case["best_is_last"] == (variant != "ema"), "best/ holds the averaged weights where there are any"


@pytest.mark.parametrize(
    "name", cases(["ema-zero3", "aligned-zero2", "prescaled-zero1", "prescaled-zero3"], ["ema-zero3"])
)
def test_settings_without_effect_on_training(trained: dict[str, dict[str, Any]], name: str) -> None:
    assert trained[name]["losses"] == pytest.approx(trained["fp32-zero1"]["losses"], rel=1e-5)
