"""tensor_parallel.autotp_size on real ranks: whatever holds the layers together, a run is that of one rank.

`make test` trains one model on two ranks, `make test-nightly` all of them on four: two copies of two ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker
from toolkit.checkpointing.checkpoints import name_of
from toolkit.cluster.tensor_parallel import Part, own_part, part_of, whole_shape

SIZE, STEPS, SAVED = 2, 6, 2  # ranks of a group; steps of a run, and the one from which others resume
IN_GROUPS = [f"ds.tensor_parallel.autotp_size={SIZE}"]
FP32 = ["ds.bf16=null", "ds.torch_autocast=null", "ds.data_types=null"]
BF16 = ["ds.bf16.enabled=true"]
AUTOCAST = ["ds.bf16=null", "ds.data_types=null", "ds.torch_autocast={enabled: true, dtype: bfloat16}"]
AVERAGED = ["training.ema=0.9", "training.freeze_backbone_steps=2"]
CTC = ["training.ctc_weight=0.3", "training.gradient_checkpointing=true"]
# Dropout is drawn by data-parallel rank, so that one rank does not draw it as four do.
DROPOUT = ["model.dropout=0.2", "model.pose_encoder.dropout=0.2", "augmentation.noise=0.02"]
# Case -> backbone, DeepSpeed JSON, overrides.
Case = tuple[str, str, list[str]]
CASES: dict[str, Case] = {
    **{f"qwen2-zero{stage}": ("qwen2_5_0_5b", f"zero{stage}", FP32) for stage in (0, 1, 2)},
    **{f"qwen3-zero{stage}": ("qwen3_0_6b", f"zero{stage}", FP32) for stage in (0, 1, 2)},
    "llama": ("llama3_2_1b", "zero1", FP32),
    "mistral": ("mistral_7b", "zero2", FP32),
    "gemma": ("gemma_7b", "zero0", FP32),
    "gemma2": ("gemma2_2b", "zero1", FP32),
    "average-zero0": ("qwen3_0_6b", "zero0", [*FP32, *AVERAGED]),
    "average-zero2": ("qwen2_5_0_5b", "zero2", [*FP32, *AVERAGED]),
    "ctc-zero1": ("qwen2_5_0_5b", "zero1", [*FP32, *CTC]),
    "frozen-zero2": ("qwen2_5_0_5b", "zero2", [*FP32, "model.freeze=[decoder]"]),
    "bf16-zero0": ("qwen2_5_0_5b", "zero0", ["ds.torch_autocast=null", "ds.data_types=null", *BF16]),
    "bf16-zero1": ("qwen2_5_0_5b", "zero1", BF16),
    "bf16-zero2": ("qwen3_0_6b", "zero2", BF16),
    "autocast-zero1": ("qwen2_5_0_5b", "zero1", AUTOCAST),
}
BY_DAY = ("qwen3-zero1",)


def overrides_of(case: Case) -> dict[str, Any]:
    backbone, ds, overrides = case
    return {"ds": ds, "overrides": [f"model.backbone={backbone}", *overrides]}


def in_groups(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    return case | {"overrides": [*case["overrides"], *IN_GROUPS]} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor_parallel")


@pytest.fixture(scope="module")
def start(fork: Callable[..., Any], settings: list[str], folder: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Trains cases on so many ranks in one start; what each gave, by name."""
    shared = [
        *prepared(settings),
        f"training.max_steps={STEPS}",
        f"training.save_every={SAVED}",
        "training.keep_last=9",
        "training.learning_rate=3e-3",
        "training.warmup_ratio=0",
        "training.epochs=9",
        "training.eval_every=99",
        "training.compile=false",
        "model.dropout=0",
        "model.pose_encoder.dropout=0",
        "evaluation.length_penalty=4",  # of a model that has learnt nothing yet, for it to write something
    ]

    def start(ranks: int, chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
        own = folder / f"on_{ranks}"
        own.mkdir(exist_ok=True)
        script = "tests/end_to_end/tensor_parallel_worker.py"
        found = run_worker(fork, script, own, ranks=ranks, cases=chosen, settings=shared)
        return {name: outcome | {"folder": own / name} for name, outcome in found.items()}

    return start


@pytest.fixture(scope="module")
def trained(start: Any, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Each case of one rank, and of ranks that hold its layers together."""
    chosen = {name: overrides_of(CASES[name]) for name in (CASES if is_night(request) else BY_DAY)}
    alone = {f"{name} alone": outcome for name, outcome in start(1, chosen).items()}
    return alone | start(
        2 * SIZE if is_night(request) else SIZE, {name: in_groups(case) for name, case in chosen.items()}
    )


@pytest.mark.parametrize("name", cases(CASES, BY_DAY))
def test_a_run_is_that_of_one_rank(trained: dict[str, dict[str, Any]], name: str) -> None:
    together, alone = trained[name], trained[f"{name} alone"]
    for outcome in (together, alone):
        assert "failed" not in outcome and "refused" not in outcome, outcome
    assert together["held"] < 0.9 * alone["held"], "layers are split"
    assert together["alike"], "what is not split is the same on all ranks of a group"
    exact = CASES[name][2][: len(FP32)] == FP32
    near = 1e-5 if exact else 1e-2
    assert len(alone["loss"]) == STEPS
    assert together["loss"] == pytest.approx(alone["loss"], rel=near)
    # Of CTC's gradients, which are ten times as large, the last figures differ by stage, too.
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4 if exact else 3e-2)
    assert together["clips"] == alone["clips"] and together["model_flops"] == pytest.approx(
        alone["model_flops"], rel=1e-2
    )
    assert together["uids"] == alone["uids"] and len(set(together["uids"])) == len(together["uids"])
    assert together["same_scores"] and together["best_is_last"]
    if exact:
        assert together["hypotheses"] == alone["hypotheses"] and any(together["hypotheses"])
        assert together["scores"] == alone["scores"]
    for weight, other in same_weights(together, alone):
        assert torch.allclose(weight, other, atol=1e-3 if exact else 3e-2, rtol=0)


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of two saved models; without the biases of keys, whose gradients are nothing but rounding."""
    first, second = (load_file(run["folder"] / "best" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert weight.shape == second[name].shape
        if not name.endswith("k_proj.bias"):
            yield weight.float(), second[name].float()


@pytest.fixture(scope="module")
def resumed(start: Any) -> dict[str, dict[str, Any]]:
    """Runs that stop and resume, on the same ranks, on others and at another stage; and one with a bad gradient."""
    exact = overrides_of(("qwen3_0_6b", "zero1", FP32))
    noisy = overrides_of(("qwen2_5_0_5b", "zero2", [*FP32, *DROPOUT, "training.ema=0.9"]))
    other = overrides_of(("qwen3_0_6b", "zero2", FP32))
    four = {
        "noisy": in_groups(noisy),
        "noisy again": in_groups(noisy, resume=f"noisy/checkpoints/{name_of(SAVED)}"),
        "stopped": in_groups(noisy, stop_after=SAVED),
        "stopped, resumed": in_groups(noisy, resume=f"stopped/checkpoints/{name_of(SAVED)}"),
        "whole": in_groups(exact),
        "other stage": in_groups(other, resume=f"whole/checkpoints/{name_of(SAVED)}"),
        "guarded": in_groups(exact, spoiled=3, guarded=True),
        "skipped": in_groups(exact, spoiled=3),
        "not skipped": in_groups(overrides_of(("qwen3_0_6b", "zero0", FP32)), spoiled=3),
    }
    found = start(2 * SIZE, four)
    whole = found["whole"]["folder"]
    saved = f"{whole}/checkpoints/{name_of(SAVED)}"
    alone = {"each alone": exact | {"resume": saved}, "skipped alone": exact | {"spoiled": 0}}
    return found | start(SIZE, {"two ranks": in_groups(other, resume=saved)}) | start(1, alone)


@pytest.mark.nightly
def test_a_run_resumes_to_the_last_bit_with_dropout(resumed: dict[str, dict[str, Any]]) -> None:
    noisy, again, stopped, rest = (resumed[name] for name in ("noisy", "noisy again", "stopped", "stopped, resumed"))
    assert noisy["alike"], "ranks of a group draw the same dropout"
    assert again["loss"] == rest["loss"] == noisy["loss"][SAVED:] and len(noisy["loss"]) == STEPS
    assert again["digest"] == rest["digest"] == noisy["digest"]
    assert stopped["interrupted"] and stopped["loss"] == noisy["loss"][:SAVED]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["other stage", "two ranks"])
def test_a_run_resumes_on_other_copies_and_stages(resumed: dict[str, dict[str, Any]], name: str) -> None:
    assert "failed" not in resumed[name] and "refused" not in resumed[name], resumed[name]
    assert resumed[name]["loss"] == pytest.approx(resumed["whole"]["loss"][SAVED:], rel=1e-5)


@pytest.mark.nightly
def test_a_checkpoint_is_not_resumed_with_other_parts_of_layers(resumed: dict[str, dict[str, Any]]) -> None:
    assert f"autotp_size={SIZE}, and this run has 1" in resumed["each alone"]["refused"]


@pytest.mark.nightly
def test_a_gradient_of_one_part_that_is_not_finite_stops_all_ranks(resumed: dict[str, dict[str, Any]]) -> None:
    """Where the guard sees it, before the step; later DeepSpeed skips the step at stages 1 and 2, as on one rank."""
    assert "no finite gradient on another rank" in resumed["guarded"]["refused"] and not resumed["guarded"]["loss"]
    skipped, alone = resumed["skipped"], resumed["skipped alone"]
    assert skipped["alike"] and skipped["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert "not finite" in resumed["not skipped"]["refused"] and len(resumed["not skipped"]["loss"]) == 1


def test_parts_of_a_weight_are_its_rows_or_its_columns() -> None:
    values = torch.arange(24.0).view(4, 6)
    for dim, wanted in ((0, values[2:]), (1, values[:, 3:])):
        weight = torch.nn.Parameter(wanted.clone())
        weight.tensor_parallel_part = Part(dim, 1, 2, None)
        assert part_of(weight) == Part(dim, 1, 2, None) and whole_shape(weight) == values.shape
        assert torch.equal(own_part(weight, values), wanted)
    assert part_of(values) is None and own_part(values, values) is values and whole_shape(values) == values.shape
