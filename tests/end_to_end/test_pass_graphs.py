"""training.compile=graphs on two ranks and real DeepSpeed; a stand-in for CUDA graphs repeats recorded calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker

STEPS = 4  # an epoch has three; no pass of the first one is replayed
FP32 = ["ds.bf16.enabled=false", "ds.torch_autocast.enabled=false", "ds.data_types=null"]
AUTOCAST = ["ds.bf16.enabled=false", "ds.torch_autocast.enabled=true", "ds.torch_autocast.dtype=bfloat16"]
DROPOUT = ["model.dropout=0.2", "model.pose_encoder.dropout=0.2"]
# Where passes can be graphs -> overrides. Micro-batches of a step have different shapes, and gradients are clipped.
CASES: dict[str, list[str]] = {
    "zero0": [],
    "zero0-fp32": FP32,
    "zero0-average": [*FP32, "training.ema=0.5", "training.eval_every=1"],
    "zero0-dropout": [*FP32, *DROPOUT],
    "zero0-adapters": [*FP32, "model.lora.r=4"],
    "zero1": [],
    "zero1-dropout": DROPOUT,
    "zero1-average": ["training.ema=0.5", "training.eval_every=1"],
    "zero1-fp32": FP32,
    "zero1-bf16": ["ds.data_types=null"],
    "zero1-autocast": [*AUTOCAST, "ds.data_types=null"],
    "zero1-autocast-sums": AUTOCAST,
    "zero1-muon": [*FP32, "training.optimizer=muon", "training.gradient_clipping=0"],
}
BY_DAY = ()  # two ranks take 25 seconds; tests/training/test_pass_graphs.py has the loop by day


@pytest.fixture(scope="module")
def start(fork: Callable[..., Any], settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains cases on two ranks in one start; what each gave, by name."""
    folder = tmp_path_factory.mktemp("pass_graphs")
    shared = [
        *prepared(settings),
        f"training.max_steps={STEPS}",
        "training.learning_rate=3e-3",
        "training.warmup_ratio=0",
        "training.epochs=9",
        "training.eval_every=99",
        "training.micro_batch_size=4",
        "training.micro_batch_frames=400",
        "training.compile=graphs",
        "model.dropout=0",
        "model.pose_encoder.dropout=0",
    ]

    def start(group: dict[str, Any]) -> dict[str, Any]:
        script = "tests/end_to_end/pass_graphs_worker.py"
        return run_worker(fork, script, folder, ranks=2, cases=group, settings=shared)

    return start


@pytest.fixture(scope="module")
def trained(start: Any, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    chosen: dict[str, Any] = {}
    for name in CASES if is_night(request) else BY_DAY:
        case = {"ds": name.split("-")[0], "overrides": CASES[name]}
        chosen |= {f"{name} by graphs": case, f"{name} as written": case | {"as_written": True}}
    if is_night(request):
        plain = [*FP32, "training.compile=false"]
        chosen["zero1-fp32 without"] = {"ds": "zero1", "overrides": plain}
    return start(chosen)


@pytest.mark.parametrize("name", cases(CASES, BY_DAY))
def test_a_replayed_pass_is_the_pass_that_was_written(trained: dict[str, dict[str, Any]], name: str) -> None:
    """With the same random numbers, too: a replay draws as the pass would have drawn."""
    case, reference = trained[f"{name} by graphs"], trained[f"{name} as written"]
    assert "failed" not in case and "refused" not in case, case
    assert case["replays"] > case["graphs"] >= 2 and not reference["replays"]
    assert len(case["losses"]) == STEPS and case["losses"][-1] < case["losses"][0]
    exact = "fp32" in name or "adapters" in name or name in ("zero0-average", "zero0-dropout", "zero1-muon")
    # In bf16 the products of all labels are rounded in another order than those of the labels that count.
    assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5 if exact else 1e-2)
    if "average" in reference:
        assert case["average"] == pytest.approx(reference["average"], rel=1e-6 if exact else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("ds", ["zero0", "zero1"])
@pytest.mark.parametrize("reference", ["false", "true"])
def test_real_graphs_change_nothing(
    run: Callable[..., Any], settings: list[str], tmp_path: Path, ds: str, reference: str
) -> None:
    """Compiled layers draw random numbers of their own: dropout is that of the same layers without graphs."""
    losses: dict[str, list[float]] = {}
    dropout = DROPOUT if reference == "true" else [name.split("=")[0] + "=0" for name in DROPOUT]
    for value in ("graphs", reference):
        folder = tmp_path / value
        more = [f"training.compile={value}", f"run.dir={folder}", *FP32, "training.max_steps=6", "training.epochs=9"]
        more += dropout
        done = run("launch/train.py", "--recipe", "t5_small", "--ds", ds, *settings, *more, ranks=1)
        assert done.code == 0, done.out[-4000:] + done.err[-4000:]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[value] = [row["loss"] for row in rows if row["kind"] == "train"]
        log = (folder / "log.txt").read_text()
        assert ("a CUDA graph: passes of" in log) == (value == "graphs") and "without CUDA graphs" not in log
        assert "py.warnings" not in log
    assert losses["graphs"] == pytest.approx(losses[reference], rel=1e-4)


@pytest.mark.nightly
def test_steps_by_graphs_are_deepspeeds_own(trained: dict[str, dict[str, Any]]) -> None:
    assert trained["zero1-fp32 by graphs"]["losses"] == pytest.approx(trained["zero1-fp32 without"]["losses"], rel=1e-5)


@pytest.mark.nightly
def test_a_run_with_dropout_is_repeated_and_resumed(start: Any) -> None:
    case = {"ds": "zero1", "overrides": DROPOUT}
    found = start(
        {
            "whole": case,
            "begun": case | {"stop_after": 2},
            "resumed": case | {"resume": "begun/checkpoints/step_000002"},
        }
    )
    whole, begun, resumed = (found[name] for name in ("whole", "begun", "resumed"))
    assert begun["interrupted"] and begun["losses"] == whole["losses"][:2], "the same seed gives the same run"
    assert "failed" not in resumed and "refused" not in resumed, resumed
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], rel=1e-2)
