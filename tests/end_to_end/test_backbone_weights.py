"""Two ranks under ZeRO stage 3 hold the very weights that one process holds, and never more memory than they must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, MarianConfig

from tests.rank_workers import run_worker

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
HALVES = {
    f"{half}_{key}": value
    for half in ("encoder", "decoder")
    for key, value in {"layers": 1, "ffn_dim": 64, "attention_heads": 4}.items()
}
MARIAN = {"d_model": 64, "vocab_size": 101, "pad_token_id": 1, "max_position_embeddings": 32, **HALVES}
CONFIGS = {"t5": {**T5, "decoder_start_token_id": 0}, "marian": MARIAN}
# 177 M weights, none of them large: one copy in bf16 is 337 MiB.
LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 6, "num_heads": 16, "vocab_size": 384}


@pytest.fixture(scope="module")
def results(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker found, by case."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    published = AutoModelForSeq2SeqLM.from_config(MarianConfig(**MARIAN))
    published.final_logits_bias.normal_()  # a buffer that is saved with the weights
    published.save_pretrained(folder / "published")
    return run_worker(
        run,
        "tests/end_to_end/backbone_weights_worker.py",
        folder,
        ranks=2,
        configs=CONFIGS,
        large=LARGE,
        published=str(folder / "published"),
    )


@pytest.mark.parametrize("form", ["torch.float32", "torch.bfloat16", "nf4"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_random_weights_are_equal_whole_and_partitioned(results: dict[str, Any], architecture: str, form: str) -> None:
    assert results[f"{architecture} {form}"]


@pytest.mark.parametrize("form", ["published", "published nf4"])
def test_published_weights_reach_every_rank(results: dict[str, Any], form: str) -> None:
    assert results[form]


def test_all_ranks_together_hold_little_more_than_one_copy(results: dict[str, Any]) -> None:
    grown, copy = results["memory"]["grown"], results["memory"]["copy"]
    assert copy > 300
    assert copy < grown < 1.5 * copy, "two copies would be 2, fp32 on one rank 3"


def test_four_bits_are_built_in_less_than_the_memory_of_a_copy(results: dict[str, Any]) -> None:
    grown, copy = results["memory nf4"]["grown"] / 2, results["memory nf4"]["copy"]
    assert grown < 0.75 * copy, "with what was packed still held it would be 1.25"
