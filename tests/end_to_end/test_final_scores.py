"""The best model is scored in the memory of training, by every strategy, and gets the scores of its saved folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config

from tests.by_night import cases, is_night
from tests.rank_workers import prepared, run_worker
from tests.same_translations import assert_same_translations

# Trained by `make test`; the others by night.
BY_DAY = ("zero2", "crowded-zero3", "nf4-zero2", "lora-zero3")
Scored = tuple[Path, dict[str, list[dict[str, int]]]]
MEBI = 2**20
WEIGHTS = 60 * MEBI  # about the size of the model whose memory is measured
BACKBONE = T5Config(
    d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=2, vocab_size=384, decoder_start_token_id=0
)
LORA = ["model.lora.r=4", "training.ctc_weight=0"]
# Strategies whose memory is measured, with a model large enough for it.
MEASURED = ("zero2", "zero3", "zero3_offload", "crowded-zero3")
# Copies of the model that a rank holds while the best one translates: the shard, and the whole weights that it gathers
# where there is room. A second model would be one more.
COPIES = {"zero2": 1.0, "zero3": 1.5, "zero3_offload": 1.5, "crowded-zero3": 0.5}
# Cases whose scores alone are compared, with a tiny model: those that save and load weights in other ways.
SCORED = {
    "bf16-zero1": ["ds.bf16.enabled=true"],
    "own-zero2_autocast": ["ds.torch_autocast.enabled=true"],
    "lora-zero3": LORA,
    "nf4-zero2": [*LORA, "model.quantization=nf4"],
    "ema-zero3": ["training.ema=0.5"],
    "rows-zero3": ["model.freeze=[embeddings]", "model.extra_tokens=[<one>, <two>]"],
    "norms-zero2": ["model.pose_encoder=conformer", "model.pose_encoder.hidden=32"],
}
AGAIN = ("lora-zero3", "ema-zero3")  # started again after a crash of the scoring
CROWDED = ("rows-zero3", "crowded-zero3")  # no room for whole weights: layers are gathered one at a time


@pytest.fixture(scope="module")
def scored(
    run: Callable[..., Any],
    settings: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Scored:
    """The folder of the runs, and by case the bytes that each rank measured."""
    folder = tmp_path_factory.mktemp("final-scores")
    (folder / "backbone").mkdir()
    BACKBONE.save_pretrained(folder / "backbone")
    # One micro-batch, so that stage 2 holds no larger share of the gradient than of larger models.
    large = [
        "training.micro_batch_size=4",
        f"model.backbone={folder / 'backbone'}",
        "model.tiny=false",
        "model.tokenizer=bytes",
    ]
    shared = [*prepared(settings), "ds.bf16.enabled=false", "training.max_steps=2", "training.epochs=1"]
    small = "ds.zero_optimization.stage3_param_persistence_threshold=0"
    plan = {
        name: {
            "ds": name.split("-")[-1],
            "overrides": [*overrides, *([small] if "zero3" in name else [])],
            "again": name in AGAIN,
            "crowded": name in CROWDED,
        }
        for name, overrides in (dict.fromkeys(MEASURED, large) | SCORED).items()
        if name in BY_DAY or is_night(request)
    }
    return folder, run_worker(
        run, "tests/end_to_end/final_scores_worker.py", folder, ranks=2, cases=plan, settings=shared
    )


@pytest.mark.parametrize("name", cases(MEASURED, BY_DAY))
def test_scoring_takes_no_more_memory_than_training(scored: Scored, name: str) -> None:
    for rank in scored[1][name]:
        assert rank["training"] > WEIGHTS, "the model is too small to measure"
        assert rank["scoring"] <= 1.05 * rank["training"]


@pytest.mark.parametrize("name", cases(MEASURED, BY_DAY))
def test_scoring_holds_no_second_model(scored: Scored, name: str) -> None:
    for rank in scored[1][name]:
        assert rank["tensors"] < (COPIES[name] + 0.25) * rank["model"]


@pytest.mark.parametrize("name", cases([*MEASURED, *SCORED], BY_DAY))
def test_the_scores_are_those_of_the_saved_best_model(scored: Scored, name: str) -> None:
    run_dir = scored[0] / name
    assert_same_translations(run_dir / "predictions" / "test.csv", run_dir / "of_its_user.csv")
