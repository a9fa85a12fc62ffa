"""The best model is scored in the memory that training took, by every strategy, and as its user would score it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config

from toolkit.corpus.prepare import ensure_corpus
from toolkit.recipe.load import load_recipe

MEBI = 2**20
WEIGHTS = 60 * MEBI  # of the model whose memory is measured, about
BACKBONE = T5Config(
    d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=2, vocab_size=384, decoder_start_token_id=0
)
LORA = ["model.lora.r=4", "training.ctc_weight=0"]
# By the memory that they take: the strategies, with a model of some size.
MEASURED = ("zero2", "zero3", "zero3_offload")
# By the scores alone, with a tiny model: what is kept and found again in other ways.
SCORED = {
    "bf16-zero1": ["ds.bf16.enabled=true"],
    "own-zero2_autocast": ["ds.torch_autocast.enabled=true"],
    "lora-zero3": LORA,
    "nf4-zero2": [*LORA, "model.quantization=nf4"],
    "ema-zero3": ["training.ema=0.5"],
    "rows-zero3": ["model.freeze=[embeddings]", "model.extra_tokens=[<one>, <two>]"],
    "norms-zero2": ["model.pose_encoder=conformer", "model.pose_encoder.hidden=32"],
}
AGAIN = ("lora-zero3", "ema-zero3")  # started once more, after scoring has died
CROWDED = ("rows-zero3",)  # scored by pieces, as there is no room for more


@pytest.fixture(scope="module")
def scored(
    run: Callable[..., Any], settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, dict[str, int]]]]:
    """Where the runs are, and of each rank the peaks of each case."""
    folder = tmp_path_factory.mktemp("final-scores")
    data = [value for value in settings if value.startswith("data.")]
    corpus = ensure_corpus(load_recipe("t5_small", data).data)
    (folder / "backbone").mkdir()
    BACKBONE.save_pretrained(folder / "backbone")
    # In one micro-batch, so that stage 2 holds no more of the gradient than of larger models.
    large = [
        "training.micro_batch_size=4",
        f"model.backbone={folder / 'backbone'}",
        "model.tiny=false",
        "model.tokenizer=bytes",
    ]
    shared = [value for value in settings if not value.startswith("data.")]
    shared += [f"data.corpus={corpus}", "training.max_steps=2", "training.epochs=1"]
    small = "ds.zero_optimization.stage3_param_persistence_threshold=0"
    cases = {
        name: {
            "ds": name.split("-")[-1],
            "overrides": [*overrides, *([small] if "zero3" in name else [])],
            "again": name in AGAIN,
            "crowded": name in CROWDED,
        }
        for name, overrides in (dict.fromkeys(MEASURED, large) | SCORED).items()
    }
    results, plan = folder / "results.json", folder / "plan.json"
    plan.write_text(json.dumps({"cases": cases, "settings": shared, "folder": str(folder), "results": str(results)}))
    done = run("tests/end_to_end/final_scores_worker.py", plan, ranks=2)
    assert done.code == 0, done.out[-4000:] + done.err[-4000:]
    return folder, json.loads(results.read_text())


@pytest.mark.parametrize("name", MEASURED)
def test_scoring_takes_no_more_memory_than_training(scored: tuple[Path, list[Any]], name: str) -> None:
    for peaks in scored[1]:
        assert peaks[name]["training"] > WEIGHTS, "the model was to be large enough to measure"
        assert peaks[name]["scoring"] <= 1.05 * peaks[name]["training"]


@pytest.mark.parametrize("name", [*MEASURED, *SCORED])
def test_the_scores_are_those_that_the_user_of_best_gets(scored: tuple[Path, list[Any]], name: str) -> None:
    run_dir = scored[0] / name
    assert (run_dir / "predictions" / "test.csv").read_bytes() == (run_dir / "of_its_user.csv").read_bytes()
