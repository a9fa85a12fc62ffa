"""A run resumes to the last bit; and on other ranks, ZeRO stages and offloads, to the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker
from toolkit.checkpointing.checkpoints import RANK_FILES, name_of

Case = dict[str, Any]
STEPS, SAVE_EVERY = 6, 2  # an epoch has three steps, so that runs resume in the middle of one
FIRST, SECOND = 2, 4  # the steps from which they resume
FP32 = ["ds.bf16.enabled=false", "ds.torch_autocast.enabled=false", "ds.data_types=null"]
# Parameters of a tiny model are partitioned over ranks, too.
SMALL = ["ds.zero_optimization.stage3_param_persistence_threshold=0"]
LORA = ["model.lora.r=4"]
KINDS = {
    "full": [],
    "lora": [*LORA, "training.global_batch_size=7"],  # clips that two ranks cannot share equally
    "nf4": [*LORA, "model.quantization=nf4"],
    "int8": [*LORA, "model.quantization=int8"],
}
NO_DROPOUT = ["model.dropout=0", "model.pose_encoder.dropout=0"]
NO_LORA_DROPOUT = ["model.lora.dropout=0"]
# DeepSpeed JSONs with which runs of two ranks of ZeRO-2 resume, and the kinds of model that try it.
TARGETS = {"zero0": ["full"], "zero1": ["full", "lora"], "zero3": ["full", "lora", "nf4"], "zero3_offload": ["full"]}


# Runs that resume to the last bit, with dropout and augmentation: DeepSpeed JSON and overrides.
EXACT = {
    "zero0": ("zero0", []),
    "zero2_offload": ("zero2_offload", ["training.ema=0.9", "training.freeze_backbone_steps=3"]),
    "zero3": ("zero3", SMALL),
    "lora": ("zero3", LORA),
    "nf4": ("zero2", KINDS["nf4"]),
    "muon": ("zero2", ["training.optimizer=muon", "training.gradient_clipping=0"]),
}

# Runs of fp32 that resume with fewer bits: in the weights, and in the optimizer's moments, too.
LESS_PRECISE = {"bf16": "zero2", "bf16-states": "zero2_bf16_states"}

# What `make test` trains: a run that resumes at another stage, on other ranks, and to the last bit. The rest by night.
TARGETS_BY_DAY = ("full-zero1", "lora-zero3")
KINDS_BY_DAY = ("lora",)
EXACT_BY_DAY = ("zero2_offload", "zero3")
BY_DAY = {
    *TARGETS_BY_DAY,
    *("full-whole", "lora-whole"),
    *(f"{kind}-{which}" for kind in KINDS_BY_DAY for which in ("one", "two")),
    *(f"exact-{name}-{which}" for name in EXACT_BY_DAY for which in ("whole", "rest")),
}


def exactly(kind: str) -> list[str]:
    """Overrides under which a run's losses do not depend on its ranks."""
    return [*FP32, *NO_DROPOUT, *KINDS[kind], *NO_LORA_DROPOUT * (kind != "full"), "training.ema=0.9"]


def saved(name: str, step: int) -> str:
    return f"{name}/checkpoints/{name_of(step)}"


def cases_of_two_ranks() -> list[Case]:
    found: list[Case] = [{"name": f"{kind}-whole", "ds": "zero2", "overrides": exactly(kind)} for kind in KINDS]
    found += [
        {
            "name": f"{kind}-{ds}",
            "ds": ds,
            "overrides": [*exactly(kind), *SMALL * (ds == "zero3")],
            "resume": saved(f"{kind}-whole", SECOND),
        }
        for ds, kinds in TARGETS.items()
        for kind in kinds
    ]
    full = exactly("full")
    found.append({"name": "offload", "ds": "zero3_offload", "overrides": full, "stop_after": SECOND})
    found.append({"name": "offload-zero1", "ds": "zero1", "overrides": full, "resume": saved("offload", SECOND)})
    bf16 = [*NO_DROPOUT, "training.ema=0.9"]
    for name, ds in LESS_PRECISE.items():
        found.append({"name": name, "ds": ds, "overrides": bf16, "resume": saved("full-whole", SECOND)})
    eight = [*FP32, "training.optimizer=adamw8bit"]
    found.append({"name": "eight", "ds": "zero2", "overrides": eight, "stop_after": SECOND})
    found.append({"name": "eight-same", "ds": "zero2", "overrides": eight, "resume": saved("eight", SECOND)})
    found.append({"name": "eight-zero1", "ds": "zero1", "overrides": eight, "resume": saved("eight", SECOND)})
    return found


def cases_of_one_rank() -> list[Case]:
    found: list[Case] = [
        {
            "name": f"{kind}-one",
            "ds": "zero2",
            "overrides": exactly(kind),
            "resume": saved(f"{kind}-whole", FIRST),
            "stop_after": SECOND - FIRST,
        }
        for kind in KINDS
    ]
    for name, (ds, extra) in EXACT.items():
        same = [*FP32, "augmentation.noise=0.02", *extra]
        whole = f"exact-{name}-whole"
        found.append({"name": whole, "ds": ds, "overrides": same})
        found.append({"name": f"exact-{name}-rest", "ds": ds, "overrides": same, "resume": saved(whole, SECOND)})
    return found


def cases_of_two_ranks_again() -> list[Case]:
    return [
        {
            "name": f"{kind}-two",
            "ds": "zero3" if kind != "int8" else "zero2",
            "overrides": exactly(kind),
            "resume": saved(f"{kind}-one", SECOND),
        }
        for kind in KINDS
    ]


@pytest.fixture(scope="module")
def trained(
    fork: Callable[..., Any],
    settings: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, dict[str, Any]]:
    """What each case gave, by name: two ranks, then one, then two."""
    folder = tmp_path_factory.mktemp("elastic")
    shared = [
        *prepared(settings),
        f"training.max_steps={STEPS}",
        f"training.save_every={SAVE_EVERY}",
        "training.keep_last=9",
        "training.learning_rate=3e-3",
        "training.epochs=9",
        "training.eval_every=99",
        "training.log_every=1",
    ]
    results: dict[str, dict[str, Any]] = {}
    phases = (cases_of_two_ranks(), 2), (cases_of_one_rank(), 0), (cases_of_two_ranks_again(), 2)
    for group, ranks in phases:
        by_name = {case["name"]: case for case in group if case["name"] in BY_DAY or is_night(request)}
        results |= run_worker(
            fork, "tests/end_to_end/elastic_worker.py", folder, ranks=ranks, cases=by_name, settings=shared
        )
    assert not {name: result["failed"] for name, result in results.items() if "failed" in result}
    return results


@pytest.mark.parametrize(
    "name", cases((f"{kind}-{ds}" for ds, kinds in TARGETS.items() for kind in kinds), TARGETS_BY_DAY)
)
def test_a_run_resumes_at_another_zero_stage(trained: dict[str, dict[str, Any]], name: str) -> None:
    check_resumed(trained, name.partition("-")[0], name, SECOND)
    assert "zero stage 2 ->" in " ".join(trained[name]["printed"])


@pytest.mark.nightly
def test_a_run_resumes_from_offloaded_shards(trained: dict[str, dict[str, Any]]) -> None:
    check_resumed(trained, "full", "offload-zero1", SECOND)


@pytest.mark.parametrize("kind", cases(KINDS, KINDS_BY_DAY))
def test_two_ranks_then_one_then_two(trained: dict[str, dict[str, Any]], kind: str) -> None:
    check_resumed(trained, kind, f"{kind}-one", FIRST)
    assert "world size 2 -> 1" in " ".join(trained[f"{kind}-one"]["printed"])
    check_resumed(trained, kind, f"{kind}-two", SECOND)
    assert "1 rank is new" in " ".join(trained[f"{kind}-two"]["printed"])


def check_resumed(trained: dict[str, dict[str, Any]], kind: str, name: str, after: int) -> None:
    """It has the losses and learning rates of the uninterrupted run."""
    whole, rest = trained[f"{kind}-whole"], trained[name]
    assert "refused" not in rest, rest
    count = len(rest["losses"])
    # NF4 differs between ZeRO-3 and ZeRO-2 without an interruption: by 2e-4 after four steps.
    tolerance = 1e-3 if kind == "nf4" else 1e-4
    assert count and rest["losses"] == pytest.approx(whole["losses"][after : after + count], rel=tolerance)
    assert rest["rates"] == whole["rates"][after : after + count]
    if after + count == STEPS:
        assert rest["average"] == pytest.approx(whole["average"], rel=1e-5)


@pytest.mark.parametrize("name", cases(EXACT, EXACT_BY_DAY))
def test_the_same_layout_resumes_to_the_last_bit(trained: dict[str, dict[str, Any]], name: str) -> None:
    whole, rest = trained[f"exact-{name}-whole"], trained[f"exact-{name}-rest"]
    assert len(whole["losses"]) == STEPS
    assert rest["losses"] == whole["losses"][SECOND:]
    assert rest["weights"] == whole["weights"]
    assert rest.get("average") == whole.get("average")
    assert not [line for line in rest["printed"] if line.startswith("note:")]


@pytest.mark.nightly
@pytest.mark.parametrize("name", LESS_PRECISE)
def test_another_precision_resumes_with_a_note(trained: dict[str, dict[str, Any]], name: str) -> None:
    assert "precision fp32 -> bf16" in " ".join(trained[name]["printed"])
    assert trained[name]["losses"] == pytest.approx(trained["full-whole"]["losses"][SECOND:], rel=0.05)


@pytest.mark.nightly
def test_an_8_bit_optimizer_resumes_only_in_the_same_layout(trained: dict[str, dict[str, Any]]) -> None:
    assert len(trained["eight-same"]["losses"]) == STEPS - SECOND
    refusal = trained["eight-zero1"]["refused"]
    assert "AdamW8bit" in refusal and "zero_stage 2" in refusal and "\n" not in refusal


@pytest.mark.parametrize("kind", cases(["lora", "nf4", "int8"], KINDS_BY_DAY))
def test_frozen_weights_are_not_saved_again(trained: dict[str, dict[str, Any]], kind: str) -> None:
    checkpoint = Path(trained[f"{kind}-whole"]["run_dir"]) / "checkpoints" / name_of(FIRST)
    names = set()
    for path in checkpoint.glob(RANK_FILES):
        with safe_open(path, framework="pt") as file:
            names |= {name for name in file.keys() if name.endswith("/weights")}  # noqa: SIM118 - it is no dict
    assert any("lora_A" in name for name in names) and any(name.startswith("pose_encoder") for name in names)
    assert all("lora_" in name for name in names if name.startswith("backbone"))
