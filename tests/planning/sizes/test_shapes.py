"""The micro-batches that limits permit: what the loader makes of them never takes more than what is rehearsed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_runs import corpus, resolve
from toolkit.batching.ladder import fitted_rungs, micro_batches_on_rungs, training_ladder
from toolkit.batching.lengths import rung_above
from toolkit.batching.order import epoch_order, micro_batches, micro_batches_by_frames
from toolkit.corpus.packed import Corpus
from toolkit.planning.sizes.shapes import (
    SHORT_CLIPS,
    Lengths,
    Limits,
    Shape,
    generation_batches,
    heaviest,
    lengths_of,
    limits_of,
    next_smaller,
    sizes,
    typical,
)
from toolkit.recipe.resolve import ResolvedRun

__all__ = ["corpus", "resolve"]


def lengths(share: int, longest: int, median: int, frame_limit: int | None = None) -> Lengths:
    return Lengths(share, longest, median, ["text"], ["text"], frame_limit)


def test_each_smaller_size_needs_a_pass_more_of_equal_passes() -> None:
    assert sizes(32) == [32, 16, 11, 8, 7, 6, 5, 4, 3, 2, 1]
    assert sizes(1) == [1]


def test_the_whole_share_in_one_pass_has_no_limit_of_frames() -> None:
    assert limits_of(32, lengths(32, 300, 90)) == Limits(32, None)


def test_one_long_clip_does_not_make_every_micro_batch_small() -> None:
    found = limits_of(2, lengths(32, 300, 90))
    assert found == Limits(6, 600), "three clips of typical length for each of the longest"
    assert typical(found, lengths(32, 300, 90)).clips == 6
    alike = limits_of(2, lengths(32, 100, 100))
    assert alike == Limits(2, 200)


def test_a_recipes_own_limit_of_frames_holds() -> None:
    assert limits_of(4, lengths(32, 300, 90, frame_limit=700)).frames == 700
    assert limits_of(32, lengths(32, 300, 90, frame_limit=700)).frames == 700


@given(
    frames=st.lists(st.integers(2, 300), min_size=4, max_size=60),
    share=st.integers(1, 12),
    world_size=st.integers(1, 3),
    on_ladder=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_no_micro_batch_of_any_epoch_takes_more_than_the_rehearsed_ones(
    frames: list[int], share: int, world_size: int, on_ladder: bool, data: st.DataObject
) -> None:
    every = np.array(frames)
    rungs = fitted_rungs(every, 2, limit=int(every.max()) + 9) if on_ladder else ()
    longest = rung_above(rungs, int(every.max()))
    known = lengths(share, longest, rung_above(rungs, int(np.median(every))))
    limits = limits_of(data.draw(st.sampled_from(sizes(share))), known, data.draw(st.sampled_from(SHORT_CLIPS)))
    rehearsed = heaviest(limits, known)
    for epoch in range(2):
        for step in epoch_order(every, share * world_size, seed=1, epoch=epoch):
            for rank in range(world_size):
                if on_ladder:
                    shares = micro_batches_on_rungs(
                        step, every, rungs, rank, world_size, limits.clips, limits.frames, share * world_size
                    )
                    shapes = [(len(batch), padded) for batch, padded in shares]
                else:
                    if limits.frames is None:
                        batches = micro_batches(step, rank, world_size, limits.clips)
                    else:
                        batches = micro_batches_by_frames(step, every, rank, world_size, limits.clips, limits.frames)
                    shapes = [(len(batch), int(every[np.where(batch < 0, ~batch, batch)].max())) for batch in batches]
                for clips, longest in shapes:
                    for weight in ((1, 0), (0, 1), (1, 50)):  # of attention in the encoder, of texts in the decoder
                        found = memory(clips, longest, *weight)
                        most = max(memory(shape.clips, shape.frames, *weight) for shape in rehearsed)
                        # The frames of a shape are whole, those of a limit need not divide by its clips.
                        assert found <= most + clips, (clips, longest, rehearsed)


def memory(clips: int, frames: int, quadratic: int, by_clips: int) -> int:
    return clips * frames + quadratic * clips * frames**2 // 300 + by_clips * clips


def test_augmented_lengths_of_all_epochs_count(resolve: Callable[..., ResolvedRun], corpus: Corpus) -> None:
    still = [f"augmentation.{name}=0" for name in ("rotation", "scale", "translation", "noise", "speed")]
    known = lengths_of(resolve(*still, world_size=2), corpus.splits["train"])
    assert (known.share, known.longest, known.typical) == (3, 13, 10)
    changed = lengths_of(resolve("augmentation.speed=0.5", world_size=2), corpus.splits["train"])
    assert changed.longest > 13
    assert max(known.long_texts, key=len) in ("moon", "star")


def test_generation_batches_are_those_of_the_splits_that_are_not_trained_on(corpus: Corpus) -> None:
    """One clip of 17 frames."""
    assert generation_batches(corpus, 68) == [(size, [Shape(1, 17)]) for size in (68, 34, 17)]


def test_on_a_ladder_the_longest_clip_takes_its_rung(resolve: Callable[..., ResolvedRun], corpus: Corpus) -> None:
    run = resolve("augmentation.speed=0.5", "data.max_frames=18", "training.padding=ladder", world_size=2)
    known = lengths_of(run, corpus.splits["train"])
    ladder = training_ladder(corpus.splits["train"].frames, run.recipe)
    assert known.longest == ladder.frames[-1] == 18, "13 frames are slowed by half, to data.max_frames at most"
    assert known.typical in ladder.frames and known.token_rungs == ladder.tokens


def test_the_next_smaller_limits_take_less_for_the_longest_clips() -> None:
    known = lengths(128, 300, 90)
    limits, found = Limits(128, None), []
    while (smaller := next_smaller(limits, known)) is not None:
        assert heaviest(smaller, known)[0].clips < heaviest(limits, known)[0].clips
        found.append(smaller)
        limits = smaller
    assert found[0] == limits_of(64, known) and found[-1] == limits_of(1, known)
    # As many short clips as long ones: never more short ones than there were.
    assert next_smaller(Limits(43, 43 * 300), known) == Limits(32, 32 * 300)
    assert next_smaller(Limits(1, 300), known) is None
