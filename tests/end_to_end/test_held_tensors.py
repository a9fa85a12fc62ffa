"""What a rank holds while it saves is what is planned, tensor by tensor; DeepSpeed runs as on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import T5Config

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker

BACKBONE = T5Config(
    d_model=256, d_kv=32, num_heads=8, d_ff=1024, num_layers=2, vocab_size=384, decoder_start_token_id=0
)
JSONS = (
    "zero0",
    "zero1",
    "zero2",
    "zero2_autocast",
    "zero2_bf16_states",
    "zero2_offload",
    "zero3",
    "zero3_bf16_states",
)
AVERAGED = ("zero0", "zero1", "zero3_bf16_states")
NAMES = [*JSONS, *(f"ema-{ds}" for ds in AVERAGED)]
BY_DAY = ("zero1", "ema-zero0")  # trained by `make test`; the others by night


# Bytes of buffers and batches, which no plan counts; a copy of the weights would be four times as much.
OTHERS = 2 * 2**20


@pytest.fixture(scope="module")
def held(
    run: Callable[..., Any],
    settings: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, dict[str, float]]:
    """By case what its rank held, in bytes."""
    folder = tmp_path_factory.mktemp("held-tensors")
    (folder / "backbone").mkdir()
    BACKBONE.save_pretrained(folder / "backbone")
    shared = [
        *prepared(settings),
        f"model.backbone={folder / 'backbone'}",
        "model.tiny=false",
        "model.tokenizer=bytes",
        "training.max_steps=2",
        "training.epochs=1",
    ]
    plan = {}
    for name in NAMES:
        ds = name.split("-")[-1]
        # So that neither buckets nor the few weights that stage 3 keeps whole hide anything.
        small = ["ds.zero_optimization.reduce_bucket_size=100000"] if ds != "zero0" else []
        small += ["ds.zero_optimization.stage3_param_persistence_threshold=1"] if "zero3" in ds else []
        average = ["training.ema=0.9"] if name.startswith("ema-") else []
        if name in BY_DAY or is_night(request):
            plan[name] = {"ds": ds, "overrides": [*small, *average]}
    return run_worker(run, "tests/end_to_end/held_tensors_worker.py", folder, ranks=0, cases=plan, settings=shared)


@pytest.mark.parametrize("name", cases(NAMES, BY_DAY))
def test_a_rank_that_saves_holds_what_is_planned(held: dict[str, dict[str, float]], name: str) -> None:
    figures = held[name]
    assert figures["save"] == pytest.approx(figures["planned_save"], abs=OTHERS)
