"""Small gradients are reduced once a step, with the same result as one reduction for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker

STEPS = 3
FP32 = ["ds.bf16.enabled=false", "ds.torch_autocast.enabled=false", "ds.data_types=null"]
LORA = ["model.lora.r=4", "model.lora.dropout=0", "training.ctc_weight=0"]
# Clips of 55 to 274 frames: a step needs two, three or four micro-batches.
BUDGET = ["training.micro_batch_size=4", "training.micro_batch_frames=400", "training.padding=ladder"]
PARTITION_ALL = "ds.zero_optimization.stage3_param_persistence_threshold=0"
# JSON and overrides; all that trains in these tiny models is small.
CASES: dict[str, tuple[str, list[str]]] = {
    "zero2": ("zero2", FP32),
    "zero2_offload": ("zero2_offload", FP32),
    "zero3": ("zero3", [*FP32, PARTITION_ALL]),
    "frames": ("zero2", [*FP32, *BUDGET]),
    "frames, offload": ("zero3_offload", [*FP32, *BUDGET, PARTITION_ALL]),
    "uneven": (
        "zero3",
        [*FP32, "training.global_batch_size=7", PARTITION_ALL],
    ),  # one rank has four clips, the other three
    "freeze": ("zero3_offload", [*FP32, "training.freeze_backbone_steps=2", PARTITION_ALL]),
    "ema": ("zero2", [*FP32, "training.ema=0.5"]),
    "lora": ("zero3", [*FP32, *LORA, PARTITION_ALL]),
    "lora, autocast": ("zero2_autocast", LORA),
    "bf16": ("zero2", LORA),
    "bf16, partitioned": ("zero3", [*LORA, PARTITION_ALL]),
}
# Trained by `make test`; the others by night.
BY_DAY = ("frames", "lora", "bf16, partitioned")


@pytest.fixture(scope="module")
def trained(
    fork: Callable[..., Any],
    settings: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, dict[str, Any]]:
    """Results of each case, with its gradient handled as a large one and as a small one."""
    folder = tmp_path_factory.mktemp("reduction")
    shared = [*prepared(settings), f"training.max_steps={STEPS}", "training.epochs=9", "training.eval_every=99"]
    shared += ["training.learning_rate=3e-3", "training.warmup_ratio=0", "training.ctc_weight=0.5"]
    shared += ["model.dropout=0", "model.pose_encoder.dropout=0"]
    plan = {
        f"{size}: {name}": {"ds": ds, "overrides": overrides, "small": size == "once"}
        for name, (ds, overrides) in CASES.items()
        for size in ("each", "once")
        if name in BY_DAY or is_night(request)
    }
    return run_worker(fork, "tests/end_to_end/strategies_worker.py", folder, ranks=2, cases=plan, settings=shared)


@pytest.mark.parametrize("name", cases(CASES, BY_DAY))
def test_it_is_reduced_once_a_step_with_the_same_result(trained: dict[str, dict[str, Any]], name: str) -> None:
    each, once = trained[f"each: {name}"], trained[f"once: {name}"]
    assert len(each["sent"]) == STEPS
    assert once["micro_batches"] == each["micro_batches"] and min(once["micro_batches"]) > 1
    for count, before, now in zip(each["micro_batches"], each["sent"], once["sent"], strict=True):
        # Sums of bf16 gradients over micro-batches would not be fp32.
        assert now == before if name.startswith("bf16") else now == pytest.approx(before / count, rel=0.02)
    tolerance = 1e-3 if name.endswith("autocast") else 1e-5
    assert once["losses"] == pytest.approx(each["losses"], rel=tolerance)
    assert once["grad_norms"] == pytest.approx(each["grad_norms"], rel=10 * tolerance)
    assert once["weights_norm"] == pytest.approx(each["weights_norm"], rel=tolerance)
    assert once["restored"]


def test_a_frame_budget_has_steps_of_different_numbers_of_micro_batches(trained: dict[str, dict[str, Any]]) -> None:
    assert len(set(trained["once: frames"]["micro_batches"])) > 1
