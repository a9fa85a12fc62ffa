"""The ladder of lengths: least padding of all short ladders, few shapes, and no clip lost or longer than its rung."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batching.test_order import log_normal_lengths
from toolkit.batching.ladder import (
    MOST_RUNGS,
    fitted_rungs,
    least_padding,
    micro_batches_on_rungs,
    token_rungs,
    training_ladder,
)
from toolkit.batching.lengths import batch_lengths, draws_of_epoch, longest_of_any_epoch, rung_above
from toolkit.batching.order import epoch_order, micro_batches, micro_batches_by_frames
from toolkit.recipe.schema import Recipe

CLIPS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)


def padded(lengths: np.ndarray, rungs: tuple[int, ...]) -> int:
    return sum(rung_above(rungs, int(length)) for length in lengths)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "model": {"backbone": "t5_small"}, **sections})


@given(lengths=CLIPS, unit=st.integers(1, 9), most=st.integers(1, 4), beyond=st.integers(0, 12), cap=st.booleans())
@settings(deadline=None)
def test_no_ladder_of_so_many_rungs_pads_less(
    lengths: np.ndarray, unit: int, most: int, beyond: int, cap: bool
) -> None:
    longest = int(lengths.max()) + beyond
    limit = longest if cap else longest + unit
    found = least_padding(lengths, unit, most, longest, limit)
    multiples = [min(unit * number, limit) for number in range(1, -(-longest // unit) + 1)]
    *below, last = multiples
    best = min(
        padded(lengths, (*chosen, last))
        for size in range(most)
        for chosen in combinations(below, min(size, len(below)))
    )
    assert set(found) <= set(multiples) and list(found) == sorted(set(found))
    assert len(found) <= most and longest <= found[-1] == last <= limit
    assert padded(lengths, found) == best


def test_a_rung_that_no_clip_needs_is_left_out() -> None:
    assert least_padding(np.array([8, 8, 40]), 8, 16, 64, 64) == (8, 40, 64)


def test_rungs_are_multiples_of_eight_encoder_positions_up_to_the_longest_clip() -> None:
    lengths = log_normal_lengths(20_000)
    found = fitted_rungs(lengths, 2)
    assert len(found) == MOST_RUNGS
    assert all(rung % 16 == 0 for rung in found[:-1]) and found[-1] == 300
    assert all(rung % 8 == 0 for rung in fitted_rungs(lengths, 1)[:-1])


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("shrink", [1, 4, 10])
def test_clips_of_any_length_are_padded_by_a_twelfth_at_most(stride: int, shrink: int) -> None:
    lengths = np.maximum(log_normal_lengths(20_000) // shrink, 1)
    rungs = fitted_rungs(lengths, stride)
    share = 1 - lengths.sum() / padded(lengths, rungs)
    # An encoder position is the smallest unit.
    assert share <= max(0.08, 0.6 * stride / lengths.mean())
    assert len(rungs) <= MOST_RUNGS


def test_texts_get_six_rungs_up_to_the_limit() -> None:
    assert token_rungs(128) == (24, 32, 48, 64, 96, 128)
    assert token_rungs(20) == (8, 16, 20)
    assert token_rungs(1) == (1,)


@given(
    lengths=CLIPS,
    speed=st.floats(0, 1),
    crop=st.floats(0, 1),
    drop=st.floats(0, 1),
    max_frames=st.integers(10, 80),
    stride=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None, max_examples=50)
def test_no_epoch_has_a_longer_clip_than_the_last_rung(
    lengths: np.ndarray, speed: float, crop: float, drop: float, max_frames: int, stride: int
) -> None:
    augmentation = {"speed": speed, "temporal_crop": crop, "frame_drop": drop}
    given_recipe = recipe(augmentation=augmentation, data={"max_frames": max_frames, "min_frames": 1})
    given_recipe = given_recipe.model_copy(
        update={"model": given_recipe.model.model_copy(update={"pose_encoder": stride_of(stride)})}
    )
    rungs = training_ladder(lengths, given_recipe).frames
    for epoch in range(4):
        drawn = batch_lengths(lengths, draws_of_epoch(lengths, given_recipe, epoch), given_recipe)
        assert drawn.max() <= longest_of_any_epoch(lengths, given_recipe) <= rungs[-1]
    assert rungs[-1] <= max(max_frames, lengths.max())


def stride_of(stride: int) -> Any:
    return recipe(model={"backbone": "t5_small", "pose_encoder": {"stride": stride}}).model.pose_encoder


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=90).map(np.array),
    world_size=st.integers(1, 9),
    micro=st.integers(1, 60),
    budget=st.none() | st.integers(1, 3000),
    more=st.integers(0, 60),
)
@settings(deadline=None)
def test_every_clip_is_in_one_micro_batch_within_the_limits(
    lengths: np.ndarray, world_size: int, micro: int, budget: int | None, more: int
) -> None:
    rungs = fitted_rungs(lengths, 2)
    batch = np.random.default_rng(0).permutation(len(lengths))
    ranks = [
        micro_batches_on_rungs(batch, lengths, rungs, rank, world_size, micro, budget, len(lengths) + more)
        for rank in range(world_size)
    ]
    assert len({len(shares) for shares in ranks}) == 1, "ranks with fewer micro-batches would leave the others waiting"
    shares = [share for own in ranks for share in own]
    assert sorted(clip for share, _ in shares for clip in share if clip >= 0) == list(range(len(lengths)))
    for share, frames in shares:
        clips = np.where(share < 0, ~share, share)
        assert frames in rungs and lengths[clips].max() <= frames
        assert len(share) <= micro and (budget is None or len(share) == 1 or len(share) * frames <= budget)
        assert (share >= 0).all() or list(share >= 0) == sorted(share >= 0, reverse=True), "fillers are last"
    if more:
        assert len({len(share) for share, _ in shares}) == 1, "a partial batch has the shapes of full ones"


# Padded frames beyond those of the longest clip of each micro-batch, and shapes that an epoch meets.
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize(
    ("batch", "micro", "budget", "shapes"),
    [(128, 16, None, 34), (128, 128, None, 34), (32, 8, None, 34), (128, 32, 2400, 44), (128, 64, 4800, 44)],
)
def test_few_shapes_cost_eight_points_of_padding_at_most(
    batch: int, micro: int, budget: int | None, shapes: int, world_size: int
) -> None:
    lengths = log_normal_lengths(10_000)
    rungs = fitted_rungs(lengths, 2)
    met, frames = set(), {"longest": 0, "ladder": 0}
    steps = epoch_order(lengths, batch, 0, 0)
    for clips in steps:
        for rank in range(world_size):
            for share, rung in micro_batches_on_rungs(clips, lengths, rungs, rank, world_size, micro, budget, batch):
                met.add((len(share), rung))
                frames["ladder"] += len(share) * rung
            plain = (
                micro_batches(clips, rank, world_size, micro)
                if budget is None
                else micro_batches_by_frames(clips, lengths, rank, world_size, micro, budget)
            )
            frames["longest"] += sum(
                len(share) * int(lengths[np.where(share < 0, ~share, share)].max()) for share in plain
            )
    points = 100 * (1 - lengths.sum() / frames["ladder"]) - 100 * (1 - lengths.sum() / frames["longest"])
    assert points <= 8
    assert len(met) <= shapes
