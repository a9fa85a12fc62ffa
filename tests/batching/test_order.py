"""The order of an epoch: every clip once, the same batches for any world size, little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.batching.order import (
    epoch_order,
    evaluation_order,
    micro_batches,
    micro_batches_by_frames,
    share_of_rank,
    steps_per_epoch,
)
from toolkit.recipe.batches import micro_batch_sizes

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=200).map(lambda values: np.array(values, np.int32))


def log_normal_lengths(clips: int, seed: int = 0) -> np.ndarray:
    """Lengths like those of continuous signing: median 90 frames, 16 to 300."""
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(90), 0.6, clips)), 16, 300).astype(np.int32)


@given(lengths, st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_every_clip_is_in_exactly_one_batch_and_only_the_last_batch_is_partial(frames, batch_size, seed, epoch):
    order = epoch_order(frames, batch_size, seed, epoch)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(frames)))
    assert len(order) == steps_per_epoch(len(frames), batch_size)
    assert all(len(batch) == batch_size for batch in order[:-1])
    assert 1 <= len(order[-1]) <= batch_size


def test_order_follows_from_seed_and_epoch():
    frames = log_normal_lengths(1000)

    def flat(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_order(frames, 16, seed, epoch)).tolist()

    assert flat(1, 2) == flat(1, 2)
    assert flat(1, 2) != flat(1, 3)
    assert flat(1, 2) != flat(2, 2)


def test_batches_differ_from_epoch_to_epoch():
    frames = log_normal_lengths(1000)
    partners = [
        {frozenset((a, b)) for batch in epoch_order(frames, 10, 0, epoch) for a in batch for b in batch if a < b}
        for epoch in (0, 1)
    ]
    assert len(partners[0] & partners[1]) < 0.3 * len(partners[0])


def test_partial_batch_may_hold_clips_of_any_length():
    frames = np.arange(1, 106, dtype=np.int32)
    longest_of_partial = [int(frames[epoch_order(frames, 10, 0, epoch)[-1]].max()) for epoch in range(50)]
    assert min(longest_of_partial) < 40 < 80 < max(longest_of_partial)


@given(clips=st.integers(1, 300), world_size=st.integers(1, 40), limit=st.integers(1, 40))
def test_any_number_of_ranks_shares_a_global_batch(clips: int, world_size: int, limit: int) -> None:
    batch = np.random.default_rng(0).permutation(1000)[:clips]
    ranks = [micro_batches(batch, rank, world_size, limit) for rank in range(world_size)]
    seats = [share for shares in ranks for share in shares]
    real = [clip for share in seats for clip in share if clip >= 0]
    assert sorted(real) == sorted(batch.tolist())

    assert len({len(shares) for shares in ranks}) == 1, "ranks with fewer micro-batches would leave the others waiting"
    clips_of_rank = [sum(int((share >= 0).sum()) for share in shares) for shares in ranks]
    assert max(clips_of_rank) - min(clips_of_rank) <= 1
    assert len(ranks[0]) == -(-max(clips_of_rank) // limit), "as few micro-batches as the limit allows"
    real_sizes = [int((share >= 0).sum()) for share in seats]
    assert max(real_sizes) <= limit and max(real_sizes) - min(real_sizes) <= 1
    if clips >= world_size:
        assert micro_batch_sizes(clips, world_size, limit) == (min(real_sizes), max(real_sizes))

    # Fillers come only alone, only where clips ran short, and stand for a clip of this very batch.
    fillers = [share for share in seats if (share < 0).any()]
    assert all(len(share) == 1 and ~share[0] in batch for share in fillers)
    assert len(fillers) == max(0, len(seats) - clips)


@pytest.mark.parametrize(("world_size", "limit"), [(4, 8), (6, 8), (3, 16)])
def test_ranks_of_one_accumulation_step_have_similar_lengths(world_size: int, limit: int) -> None:
    frames = log_normal_lengths(20_000)
    spread = []
    for batch in epoch_order(frames, 64, 0, 0)[:100]:
        shares = [micro_batches(batch, rank, world_size, limit) for rank in range(world_size)]
        for step in range(len(shares[0])):
            longest = [int(frames[shares[rank][step]].max()) for rank in range(world_size)]
            spread.append(1 - min(longest) / max(longest))
    assert np.mean(spread) < 0.05


def test_padding_is_at_most_four_percent_on_signing_lengths():
    frames = log_normal_lengths(20_000)
    order = epoch_order(frames, 32, 0, 0)
    padded = sum(int(frames[batch].max()) * len(batch) for batch in order)
    assert 1 - frames.sum() / padded <= 0.04


@given(lengths, st.integers(1, 2000), st.integers(1, 5))
def test_evaluation_sees_every_clip_once_in_the_same_batches_on_every_number_of_ranks(frames, budget, world_size):
    batches = evaluation_order(frames, budget)
    assert all(len(batch) == 1 or len(batch) * frames[batch].max() <= budget for batch in batches)
    longest = [int(frames[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)

    shares = [share_of_rank(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    real = [batch for share in shares for batch in share if (batch >= 0).all()]
    fillers = [batch for share in shares for batch in share if (batch < 0).any()]
    assert sorted(np.concatenate(real).tolist()) == list(range(len(frames)))
    assert {tuple(batch) for batch in real} == {tuple(batch) for batch in batches}
    assert all(len(batch) == 1 and 0 <= ~batch[0] < len(frames) for batch in fillers)


def test_evaluation_of_nothing_is_no_batches():
    assert evaluation_order(np.array([], np.int32), 100) == []
    assert share_of_rank([], 1, 2) == []


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=70),
    world_size=st.integers(1, 9),
    micro=st.integers(1, 40),
    budget=st.integers(1, 3000),
)
def test_a_frame_budget_holds_on_every_rank_and_loses_no_clip(lengths, world_size, micro, budget) -> None:
    frames = np.array(lengths)
    batch = np.random.default_rng(0).permutation(len(frames))
    shares = [micro_batches_by_frames(batch, frames, rank, world_size, micro, budget) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "ranks with fewer micro-batches would leave the others waiting"
    parts = [part for share in shares for part in share]
    real = np.concatenate([part[part >= 0] for part in parts])
    assert sorted(real) == sorted(batch)
    for part in parts:
        clips = np.where(part < 0, ~part, part)
        assert 1 <= len(part) <= micro and (len(part) == 1 or len(part) * frames[clips].max() <= budget)
        assert len(part) == 1 or (part >= 0).all()
    if len(frames) >= len(parts):
        assert len(real) == sum(map(len, parts)), "a filler although micro-batches could be split"


def test_long_clips_come_in_small_micro_batches() -> None:
    frames = np.array([100, 20, 20, 20, 20, 60, 40, 20])
    parts = micro_batches_by_frames(np.arange(8), frames, 0, 1, 4, 100)
    assert [part.tolist() for part in parts] == [[0], [5], [6, 1], [2, 3, 4, 7]]


@given(lengths, st.integers(1, 50), st.integers(0, 5))
def test_sorting_by_texts_as_well_keeps_the_clips_of_an_epoch(frames, batch_size, seed):
    texts = np.random.default_rng(seed).integers(1, 99, len(frames))
    order = epoch_order(frames, batch_size, seed, 0, texts)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(frames)))
    assert [len(batch) for batch in order] == [len(batch) for batch in epoch_order(frames, batch_size, seed, 0)]
    assert all((np.diff(frames[batch]) <= 0).all() for batch in order[: len(frames) // batch_size])


def test_sorting_by_texts_as_well_pads_sequences_of_clips_and_texts_less():
    frames = log_normal_lengths(64 * 200)
    spread = np.random.default_rng(1).normal(0, 0.35, len(frames))
    texts = (0.2 * frames * np.exp(spread)).astype(np.int64) + 2  # tokens, for which their bytes stand

    def padding(order):
        """Share of padding in sequences of a position of every two frames and one of every token, and in frames."""
        rows = [micro for batch in order for micro in micro_batches(batch, 0, 1, 16)]
        positions = -(-frames // 2)
        padded = sum(len(row) * (positions[row].max() + texts[row].max()) for row in rows)
        padded_frames = sum(len(row) * frames[row].max() for row in rows)
        return 1 - (positions + texts).sum() / padded, 1 - frames.sum() / padded_frames

    by_frames, by_both = padding(epoch_order(frames, 64, 0, 0)), padding(epoch_order(frames, 64, 0, 0, texts))
    assert by_both[0] < 0.5 * by_frames[0] and by_both[0] < 0.08
    assert by_both[1] < by_frames[1] + 0.03
