"""tensor_parallel.autotp_size: which ranks take which clips, and what is refused beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.resolving import error_of, run_of
from toolkit.cluster.ranks import Ranks
from toolkit.recipe.compilation import compilation
from toolkit.recipe.resolve import ResolvedRun

TWO = ("ds.tensor_parallel.autotp_size=2", "training.micro_batch_size=4", "training.global_batch_size=16")


def test_ranks_of_a_group_take_the_same_clips(tmp_path: Path) -> None:
    run = run_of("qwen2_5_0_5b", *TWO, ds="zero1", world_size=8, has_gpu=True)
    assert (run.world_size, run.tensor_parallel_size, run.data_parallel_size) == (8, 2, 4)
    assert (run.micro_batch_size, run.accumulation_steps, run.deepspeed["train_batch_size"]) == (4, 1, 16)
    assert run.batch == "16 clips = 4 groups of 2 ranks x 1 micro-batch of 4"
    assert not run.evaluation.graphs and run.recipe.evaluation.graphs
    assert not compilation(run.recipe, run.deepspeed, has_gpu=True).compiles
    run.save(tmp_path)
    stored = ResolvedRun.load(tmp_path)
    assert (stored.world_size, stored.data_parallel_size) == (8, 4)
    places = [Ranks(rank, world_size=8, tensor_parallel_size=2) for rank in range(8)]
    assert [ranks.data_parallel_rank for ranks in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [ranks.is_first_of_copy for ranks in places] == [True, False] * 4 and places[0].data_parallel_size == 4


def test_fewer_clips_than_ranks_are_enough_for_groups() -> None:
    assert run_of("qwen2_5_0_5b", *TWO, "training.global_batch_size=2", ds="zero0", world_size=4).batch
    error = error_of("qwen2_5_0_5b", *TWO, "training.global_batch_size=1", world_size=4)
    assert "training.global_batch_size=1" in error.message and "2 ranks" in error.message


@pytest.mark.parametrize("given", ["ds.tensor_parallel.autotp_size=1", "ds.tensor_parallel.autotp_size=0"])
def test_groups_of_one_rank_are_none(given: str) -> None:
    run = run_of("t5_small", given, ds="zero3", world_size=2)
    assert run.tensor_parallel_size == 1 and run.evaluation == run.recipe.evaluation


@pytest.mark.parametrize(
    ("settings", "ds", "word"),
    [
        ([], "zero3", "ZeRO stage 3"),
        ([], "zero2_offload", "offload"),
        ([], "zero2_fp16", "fp16"),
        (["model.lora.r=8"], "zero2", "model.lora"),
        (["model.lora.r=8", "model.quantization=nf4"], "zero2", "model.quantization"),
        (["training.optimizer=lion"], "zero2", "training.optimizer=lion"),
        (["training.optimizer=muon", "training.gradient_clipping=0"], "zero2", "training.optimizer=muon"),
        (["training.micro_batch_size=auto"], "zero2", "micro_batch_size=auto"),
        (["training.compile=true"], "zero1", "training.compile=true"),
        (["training.compile=graphs"], "zero1", "training.compile=graphs"),
        (["model.backbone=t5_small"], "zero1", "model.backbone=t5_small"),
        (["ds.tensor_parallel.autotp_size=3"], "zero1", "4 ranks"),
        (["ds.tensor_parallel.autotp_size=-2"], "zero1", "autotp_size=-2"),
        (["ds.tensor_parallel.preset_model=llama"], "zero1", "tensor_parallel.preset_model"),
    ],
)
def test_what_no_test_has_shown_is_refused(settings: list[str], ds: str, word: str) -> None:
    error = error_of("qwen2_5_0_5b", *TWO, *settings, ds=ds, world_size=4, has_gpu=True)
    assert word in error.message and error.hint
