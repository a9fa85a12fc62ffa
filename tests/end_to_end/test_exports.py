"""Runs of every ZeRO stage, with adapters and without, save and export folders of the same kinds that answer alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker

STAGES = ("zero0", "zero1", "zero2", "zero3")
TOKENS = "model.extra_tokens=['<loc>', '<per>']"
LORA = ["model.lora.r=4", TOKENS]
LANGUAGE = ["model.backbone=qwen2_5_0_5b", "model.prompt='Translate {poses} into English:'"]
SMALL = ["ds.zero_optimization.stage3_param_persistence_threshold=0"]  # shards parameters of a tiny model, too
CASES: dict[str, dict[str, Any]] = {
    **{f"full-{stage}": {"ds": stage, "overrides": []} for stage in STAGES},
    **{f"lora-{stage}": {"ds": stage, "overrides": LORA} for stage in STAGES},
    "tokens-zero3": {"ds": "zero3", "overrides": [TOKENS, "model.freeze=[embeddings]"]},
    "dora-zero3": {"ds": "zero3", "overrides": ["model.lora={r: 4, dora: true, train: [layer_norms]}"]},
    "qlora-zero3": {"ds": "zero3", "overrides": [*LORA, "model.quantization={kind: nf4, compute_dtype: fp32}"]},
    "int8-zero2": {"ds": "zero2", "overrides": [*LORA, "model.quantization=int8"]},
    "language-full-zero2": {"ds": "zero2", "overrides": LANGUAGE},
    "language-lora-zero3": {"ds": "zero3", "overrides": [*LANGUAGE, *LORA]},
}
# Trained by `make test`; the others by night.
BY_DAY = ("full-zero2", "lora-zero3", "tokens-zero3", "qlora-zero3", "language-lora-zero3")
# Largest difference of a token's probability. int8 rounds activations in training, which an export does not.
TOLERANCES = {"int8-zero2": 1e-2}


@pytest.fixture(scope="module")
def trained(
    fork: Callable[..., Any],
    settings: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exports")
    shared = [*prepared(settings), "training.max_steps=3", "training.learning_rate=1e-2", "training.eval_every=99"]
    shared += [
        "ds.bf16.enabled=false",
        "ds.torch_autocast.enabled=false",
        "training.epochs=9",
        "evaluation.num_beams=1",
    ]
    plan = {
        name: case | {"overrides": [*case["overrides"], *(SMALL if case["ds"] == "zero3" else [])]}
        for name, case in CASES.items()
        if name in BY_DAY or is_night(request)
    }
    return run_worker(fork, "tests/end_to_end/exports_worker.py", folder, ranks=2, cases=plan, settings=shared)


@pytest.mark.parametrize("name", cases(CASES, BY_DAY))
def test_saved_loaded_and_exported_it_answers_as_it_did(trained: dict[str, Any], name: str) -> None:
    case, tolerance = trained[name], TOLERANCES.get(name, 1e-5)
    assert case["loaded"] < 1e-5
    assert all(difference < tolerance for difference in case["exported"].values())
    adapted = "lora" in name or "dora" in name or "int8" in name
    assert case["exported"].keys() == ({"False", "True"} if adapted else {"False"})
    files = ["adapter/adapter_model.safetensors", "trained.safetensors"] if adapted else ["model.safetensors"]
    assert case["files"] == files


@pytest.mark.parametrize("name", cases((name for name in CASES if TOKENS in CASES[name]["overrides"]), BY_DAY))
def test_rows_of_new_tokens_train_and_no_other_row(trained: dict[str, Any], name: str) -> None:
    assert trained[name]["changed_rows"] == [384, 385]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_stage_saves_the_same_tensors(trained: dict[str, Any], kind: str) -> None:
    assert len({trained[f"{kind}-{stage}"]["elements"] for stage in STAGES}) == 1
