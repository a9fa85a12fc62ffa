"""Model states by arithmetic: the ZeRO paper's figures, what a strategy divides, and what the recipes' comments say."""

from __future__ import annotations

import re

import pytest

from toolkit.planning.counts import Counts, count
from toolkit.planning.overview import overview
from toolkit.planning.states import GIB, model_states
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.load import load_recipe, recipe_names
from toolkit.recipe.model_cards import load_model_yaml
from toolkit.recipe.paths import recipes_dir

BILLION = Counts(backbone=10**9, trainable=10**9, frozen=0, packed=0, pose_encoder=0)
NO_BUCKETS = {"reduce_bucket_size": 1, "allgather_bucket_size": 1, "stage3_prefetch_bucket_size": 1}


def states_of(stage: int, ranks: int, *, counts: Counts = BILLION, recipe: str = "t5_small", **zero: object):
    config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_max_live_parameters": 1, **NO_BUCKETS, **zero},
    }
    return model_states(counts, load_recipe(recipe), config, ranks)


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    # Psi (2 + 2 + 12 / N), Psi (2 + 14 / N), Psi 16 / N: figure 1 of the ZeRO paper, with 8 ranks.
    [(0, 16.0), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)],
)
def test_what_each_stage_divides(stage: int, bytes_per_parameter: float) -> None:
    assert states_of(stage, 8).device == pytest.approx(bytes_per_parameter * 1e9, rel=1e-6)


def test_offloading_moves_states_to_the_host() -> None:
    states = states_of(2, 1, offload_optimizer={"device": "cpu"})
    assert (states.device, states.host) == (pytest.approx(2e9, rel=1e-6), pytest.approx(14e9))
    both = states_of(3, 2, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert both.device == pytest.approx(0, abs=100)
    assert both.host == pytest.approx(16e9 / 2)


def test_each_offload_counts_by_itself() -> None:
    parameters_on_disk = states_of(3, 2, offload_param={"device": "nvme"})
    assert (parameters_on_disk.device, parameters_on_disk.host) == (pytest.approx(14e9 / 2, rel=1e-6), 0)
    states_on_disk = states_of(3, 2, offload_optimizer={"device": "nvme"}, offload_param={"device": "cpu"})
    assert (states_on_disk.device, states_on_disk.host) == (pytest.approx(0, abs=100), pytest.approx(2e9 / 2))


def test_frozen_and_packed_weights_cost_themselves_alone() -> None:
    frozen = Counts(10**9, 0, 10**9, 0, 0)
    assert states_of(2, 1, counts=frozen).device == pytest.approx(2e9, rel=1e-6)
    packed = Counts(10**9, 0, 0, 10**9, 0)
    assert states_of(2, 1, counts=packed, recipe="t5_3b_lora_int8").device == pytest.approx(1e9, rel=1e-6)
    assert states_of(2, 1, counts=packed, recipe="t5_3b_qlora").device == pytest.approx(0.516e9, rel=1e-3)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_fits_the_card_that_it_names_and_says_how(name: str) -> None:
    recipe = load_recipe(name)
    counts = count(recipe)
    assert counts.backbone == load_model_yaml(recipe.model.backbone).parameters
    assert counts.trainable + counts.frozen + counts.packed >= counts.backbone
    states = model_states(counts, recipe, load_deepspeed(recipe.deepspeed, recipe.ds), world_size=1)
    assert states.fits(24)
    if name == "demo":
        return  # trains on a CPU
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    said = re.search(
        r"# One 24 GiB card: ([\d.]+) GiB of model states(?: and ([\d.]+) GiB of host memory)?, estim", text
    )
    assert said, "the recipe says what it takes"
    assert float(said[1]) == pytest.approx(states.device / GIB, abs=0.06)
    assert float(said[2] or 0) == pytest.approx(states.host / GIB, abs=0.06)
    assert "# 8 x 80 GiB: " in text
    assert f"launch/train.py --recipe {name} " in text


def test_adapters_train_a_few_numbers() -> None:
    # 24 + 24 × 2 attentions of T5-3B, queries and values of each, rank 16 from 1,024 to 32 heads × 128.
    assert overview(load_recipe("t5_3b_lora")).trainable == 72 * 2 * 16 * (1024 + 4096)
    assert overview(load_recipe("transformer")).trainable == 31_133_184 - 384 * 512 - (512 * 512 + 512)
