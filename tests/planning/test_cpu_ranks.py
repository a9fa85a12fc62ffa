"""Plans of ranks on CPUs: what is there in which moment, and that plans are near what the benchmark measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script
from toolkit.planning.costs.counts import Weight
from toolkit.planning.costs.cpu_ranks import cpu_moments
from toolkit.planning.costs.storages import Part, Peak
from toolkit.planning.costs.tracing import Trace
from toolkit.planning.costs.zero import Items
from toolkit.recipe.batches import NUMBERS_AT_ONCE
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.load import load_recipe

MILLIONS = [Weight(10**6, True)] * 20
LARGE = [Weight(10**6, True)] * 100  # their gradients are reduced as they come
PASS = Trace(saved=1e6, peaks={Part("scores", False): Peak(2e6, 2e6)}, kernels=0, flops=0)


# Of benchmarks/results/planning.json.
CELLS = (
    "t5_small/zero0/1/kept",
    "t5_small/zero1/8/recomputed",
    "t5_base_lora/zero2/8/kept",
    "t5_base_nf4/zero0/8/kept",
)


@pytest.mark.parametrize("name", CELLS)
def test_a_plan_is_within_a_tenth_of_what_was_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_script("benchmarks/planning.py")
    (row,) = (row for row in benchmark.read_rows() if row["cell"] == name)
    monkeypatch.setattr("toolkit.cpu.linear.has_fast_bf16", lambda: row["fast_bf16"])  # as predict sets it
    model, ds, clips, activations = name.split("/")
    cell = benchmark.Cell(model, ds, int(clips), recomputed=activations == "recomputed")
    assert abs(benchmark.predict(cell, tmp_path, row)["off"]) <= 0.1


def moments(ds: str, *, weights: list[Weight] = MILLIONS, micro_batches: int = 2, **zero: object) -> dict[str, Items]:
    config = load_deepspeed(ds)
    config["zero_optimization"] |= zero
    return cpu_moments(
        weights, load_recipe("t5_small"), config, 2, micro_batches=micro_batches, first=PASS, later=PASS
    )[1]


def peak(items: dict[str, Items]) -> float:
    return max(sum(moment.values()) for moment in items.values())


def test_offloading_to_the_memory_where_everything_is_takes_more_of_it() -> None:
    assert peak(moments("zero2_offload")) > peak(moments("zero2"))
    assert peak(moments("zero3_offload")) > peak(moments("zero3"))


def test_a_bucket_takes_what_gradients_fill() -> None:
    def buckets(size: int) -> float:
        return moments("zero2", weights=LARGE, reduce_bucket_size=size)["gradient reduction"]["buckets"]

    assert buckets(10**9) == buckets(10**10) == 2 * 100e6 * 2  # and its copy
    assert buckets(10**7) == 2 * 10e6 * 2


def test_activations_are_there_while_a_small_bucket_is_reduced() -> None:
    def activations(size: int) -> float:
        return moments("zero2", weights=LARGE, reduce_bucket_size=size)["gradient reduction"]["activations"]

    assert activations(10**8) == 0
    assert activations(25 * 10**6) == 0.75 * PASS.saved


def test_small_gradients_are_whole_and_leave_as_they_are_joined() -> None:
    """In parameter groups: beside them is what is copied at once, or what is sent, or a partition's sum."""
    groups = [Weight(10**6, True, fresh=fresh) for fresh in (True, True, True, False)]
    for ds, size, extra in (("zero2", 2, 2), ("zero2_autocast", 4, 4)):
        assert moments(ds, weights=groups)["gradient reduction"]["buckets"] == 4e6 * size + 3e6 * extra
    assert moments("zero2")["gradient reduction"]["buckets"] == 20e6 * 2 + NUMBERS_AT_ONCE * 2
    for name in ("zero2_offload", "zero2_bf16_states"):
        assert moments(name, weights=groups)["gradient reduction"]["buckets"] >= 2 * 4e6 * 2, "each by itself"


def test_states_on_a_disk_pass_through_buffers_of_a_parameter_group() -> None:
    groups = [Weight(10**6, True, fresh=fresh) for fresh in (True, True, True, False)]
    one, two = (
        moments("zero3_nvme", weights=some)["update"]["copies of offloading"] for some in (groups, groups[:1] * 4)
    )
    assert one == 0.75 * two > 0


def test_stage_1_sums_in_place_and_stage_0_in_a_copy() -> None:
    assert moments("zero1")["gradient reduction"]["buckets"] == 0
    assert moments("zero0")["gradient reduction"]["buckets"] == 20e6 * 4


def test_gradients_in_fp32_are_summed_whole_where_they_are_small() -> None:
    passes = moments("zero2_autocast")["later micro-batches"]["gradients"]
    assert passes == 20e6 * 4
    large = moments("zero2_autocast", weights=[Weight(10**8, True)])["later micro-batches"]["gradients"]
    assert large == 1e8 * 4 / 2
    assert "later micro-batches" not in moments("zero2_autocast", micro_batches=1)


def test_stage_3_holds_weights_twice_while_they_arrive() -> None:
    small = moments("zero3")["forward pass"]["gathered weights"]
    assert small == 2 * 20e6 * 2
    some = moments("zero3", stage3_prefetch_bucket_size=5 * 10**6)["forward pass"]["gathered weights"]
    assert some == pytest.approx(1.25 * 20e6 * 2)


def test_a_whole_gradient_is_reduced_before_there_is_a_sum() -> None:
    whole, too_large = (
        moments("zero2_autocast", weights=[Weight(size, True)])["gradient reduction"]["gradients"]
        for size in (10**7, 10**8)
    )
    assert whole == 0
    assert too_large == 10**8 * 4 / 2, "each micro-batch is reduced, and added to the sum"


@pytest.mark.parametrize(("share", "fast", "sent"), [(1.0, True, 0.5), (0.0, True, 0.5), (0.75, True, 0.375),
                                                     (0.9, True, 0.45), (1.0, False, 0.5)])  # fmt: skip
def test_under_autocast_linear_layers_are_reduced_by_themselves(
    share: float, fast: bool, sent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, from a copy of half the size; where the toolkit's own layers are there, DeepSpeed sends all in fp32."""
    monkeypatch.setattr("toolkit.cpu.linear.has_fast_bf16", lambda: fast)
    numbers = 3 * 10**7
    weights = [Weight(int(share * numbers), True, linear=True), Weight(round((1 - share) * numbers), True)]
    buckets = moments("zero2_autocast", weights=weights)["gradient reduction"]["buckets"]
    assert buckets == pytest.approx((1 + sent) * numbers * 4)
