"""What DeepSpeed holds, for a billion weights: the ZeRO paper's figures, and what its optimizers add to them."""

from __future__ import annotations

import pytest

from toolkit.planning.costs.blocks import in_blocks
from toolkit.planning.costs.counts import Weight
from toolkit.planning.costs.zero import ZeroMemory, zero_memory
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.load import load_recipe

BILLION = [Weight(10**7, True)] * 100


def memory(
    ds: str, ranks: int = 1, *, weights: list[Weight] = BILLION, recipe: str = "t5_small", **zero: object
) -> ZeroMemory:
    config = load_deepspeed(ds)
    config["zero_optimization"] |= zero
    return zero_memory(weights, load_recipe(recipe), config, ranks)


def states(item: ZeroMemory) -> float:
    return item.trained + item.master + item.moments + item.kept_gradients + item.gradients


@pytest.mark.parametrize(
    ("ds", "bytes_of_one", "bytes_of_eight"),
    [
        ("zero0", 16, 16),  # fp32: weight, gradient, two moments; no copy
        ("zero1", 20, 2 + 4 + 2 + 12 / 8),  # whole fp32 and bf16 gradients stay
        ("zero2", 18, 2 + 16 / 8),
        ("zero2_bf16_states", 10, 2 + 8 / 8),
        ("zero2_autocast", 20, 4 + 16 / 8),
        ("zero3", 18, 18 / 8),
        ("zero3_bf16_states", 10, 10 / 8),
    ],
)
def test_bytes_a_parameter(ds: str, bytes_of_one: float, bytes_of_eight: float) -> None:
    assert states(memory(ds)) == pytest.approx(bytes_of_one * 1e9)
    assert states(memory(ds, 8)) == pytest.approx(bytes_of_eight * 1e9)


def test_offloaded_states_are_on_the_host() -> None:
    item = memory("zero2_offload", 2)
    assert (item.master, item.moments) == (0, 0)
    assert item.host == pytest.approx((16 + 2) * 1e9 / 2 + 2e7)  # and a buffer of the largest weight
    assert item.kept_buckets == 2e7, "and one on the device"
    assert item.pinned == item.host
    on_disk = memory("zero3_nvme", 2)
    assert on_disk.nvme == pytest.approx(16e9 / 2)
    assert (on_disk.trained, on_disk.master) == (0, 0)


def test_buckets_have_the_size_of_the_json() -> None:
    assert memory("zero2").buckets == 50_000_000 * 2
    assert memory("zero2_autocast", 2).buckets == 2 * 50_000_000 * 4  # one for each type that is sent
    assert memory("zero2", reduce_bucket_size=1000).buckets == 2000


def test_gradients_that_move_many_at_a_time_are_whole_and_need_no_buckets() -> None:
    """Of adapters at stage 2, and of one rank that sums in fp32; a single rank copies 4 million numbers at most."""
    adapters = [Weight(10**9, False), *[Weight(10**6, True)] * 10]
    for ds, ranks, weights, reduction in (
        ("zero2", 8, adapters, 2 * (10**7 + 10**7)),  # and all in one bucket that is sent
        ("zero2", 1, adapters, 2 * (10**7 + 2**22)),
        ("zero2_autocast", 1, BILLION, 4 * 10**9),  # straight into the partition
    ):
        item = memory(ds, ranks, weights=weights)
        assert (item.buckets, item.reduction) == (0, reduction)
    assert memory("zero2", 8).buckets


def test_a_single_rank_has_nothing_to_sum() -> None:
    assert memory("zero0").reduction == memory("zero1").reduction == 0
    assert memory("zero0", 2).reduction and memory("zero1", 2).reduction


def test_stage_3_gathers_no_more_than_it_may() -> None:
    assert memory("zero3", 8).gathered == pytest.approx(2e9)
    assert memory("zero3", 8, stage3_max_live_parameters=10**8).gathered == pytest.approx(2e8)


@pytest.mark.parametrize("ds", ["zero3", "zero3_bf16_states"])
def test_the_partition_of_a_single_rank_is_the_weight(ds: str) -> None:
    alone, together = memory(ds), memory(ds, 2)
    assert (alone.gathered, alone.whole) == (0, 0)
    assert together.gathered == together.whole == 2e9
    assert alone.single == together.single == 2e7, "one by one, while they are saved"
    assert memory("zero3_offload").gathered == 2e9, "a copy of what the host has"


def test_stage_3_joins_gradients_and_sums_its_share_in_another_type() -> None:
    assert memory("zero3").reduction == 50_000_000 * (2 + 4)
    assert memory("zero3", 8).reduction == 50_000_000 * (2 + 4 / 8)
    assert memory("zero3_bf16_states", 8).reduction == 50_000_000 * 2, "sums have the type of the gradients"


def test_gradients_leave_while_a_pass_still_holds_activations() -> None:
    assert memory("zero2", 2).early == memory("zero3", 2).early == 0.95
    assert memory("zero1", 2).early == memory("zero3", 2, reduce_bucket_size=10**10).early == 0


def test_gradients_are_whole_until_a_pass_or_a_step_is_over() -> None:
    """Which of a step's passes make them, and what an earlier pass of it has left."""
    numbers = 1e9
    for ds, ranks, first, later, passed_on in (
        ("zero0", 1, True, False, 4 * numbers),  # fp32, added up in place
        ("zero1", 2, True, True, 0),  # bf16, added to fp32 sums that are always there
        ("zero2_autocast", 1, True, False, 4 * numbers),  # fp32, moved when the step is over
        ("zero2", 2, False, False, 4 * numbers / 2),  # each goes into a bucket as it comes
        ("zero3", 2, False, False, 0),
    ):
        item = memory(ds, ranks)
        assert (item.keeps_gradients, item.keeps_gradients_again, item.passed_on) == (first, later, passed_on), ds
    adapters = memory("zero2", weights=[Weight(10**9, False), Weight(10**7, True)])
    assert (adapters.keeps_gradients, adapters.keeps_gradients_again, adapters.passed_on) == (True, True, 4e7)


def test_frozen_weights_have_no_gradients_and_quantised_ones_half_a_byte() -> None:
    frozen = [Weight(10**9, False), Weight(10**6, True)]
    item = memory("zero2", weights=frozen)
    assert (item.frozen, item.gradients) == (pytest.approx(2e9, rel=1e-3), 4e6)
    packed = memory("zero2", weights=[Weight(10**9, False, packed=True), *BILLION[:1]], recipe="t5_3b_qlora")
    assert packed.packed == pytest.approx(0.516e9, rel=1e-3)
    assert packed.unpacked == 2e9


def test_frozen_weights_take_whole_blocks_of_the_allocator() -> None:
    """Of 20 MiB, those of T5-Base: 17 matrices, and what remains is too small to be of use (torch 2.11)."""
    matrix, mib = 768 * 768, 2**20
    assert in_blocks([2 * matrix] * 34) == 2 * 20 * mib
    assert in_blocks([mib, 100, 2 * matrix]) == mib + 512 + 2 * matrix
    assert in_blocks([11.5 * mib]) == 12 * mib and in_blocks([10.5 * mib]) == 10.5 * mib
    weights = [Weight(matrix, False)] * 340 + BILLION[:1]
    assert memory("zero2", weights=weights).frozen == 400 * mib
    config = load_deepspeed("zero2")
    on_cpu = zero_memory(weights, load_recipe("t5_small"), config, 1, on_cpu=True)
    assert on_cpu.frozen == 340 * 2 * matrix


def test_one_rank_sends_nothing_and_stage_2_sends_again() -> None:
    assert memory("zero2").sent == 0
    assert memory("zero1", 8).sent_again == 0
    assert memory("zero2", 8).sent_again > 0
    assert memory("zero3", 8).sent > memory("zero2", 8).sent


def test_the_states_of_a_pass_are_all_that_the_plan_counts_beside_activations() -> None:
    item = memory("zero3", 8)
    assert item.device == pytest.approx(sum(item.states.values()))
    assert item.states["gradients"] == item.kept_gradients + item.gradients
    assert item.states["gathered weights"] == item.gathered
    assert item.states["buckets"] == item.kept_buckets + item.buckets


def test_nvme_is_read_through_buffers_in_host_memory() -> None:
    on_host = memory("zero3_nvme", 2)
    on_disk = memory("zero3_nvme", 2, offload_param={"device": "nvme", "buffer_count": 3, "buffer_size": 10**8})
    assert on_disk.nvme == on_host.nvme + 2e9 / 2
    assert on_disk.host == pytest.approx(on_host.host - 2e9 / 2 + 3 * 2e8)
    fewer = memory("zero3_nvme", 2, offload_optimizer={"device": "nvme", "buffer_count": 2})
    assert on_host.host - fewer.host == pytest.approx(2 * 4 * 1e8)  # two buffers of a sub-group
