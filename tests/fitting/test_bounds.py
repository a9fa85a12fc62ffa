"""What a step takes at most by the passes of a rank: more than any micro-batch whose memory is a sum of such terms."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from toolkit.fitting.bounds import UNKNOWN, Passes, Size, states_of_a_step
from toolkit.models.build import build_processor, build_translator

BEFORE, STATES = 1000, 500
TERMS = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]  # powers of frames and tokens


def activations(size: Size, weights: list[int]) -> int:
    return sum(
        weight * size.clips * size.frames**frames * size.tokens**tokens
        for weight, (frames, tokens) in zip(weights, TERMS, strict=True)
    )


sizes = st.builds(Size, st.integers(1, 64), st.integers(1, 50), st.integers(1, 20))


@given(
    weights=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    passed=sizes,
    more=st.integers(1, 64),
    asked=st.lists(sizes, min_size=1, max_size=3),
    gradients=st.integers(0, 1000),
    resets=st.booleans(),
)
def test_no_step_takes_more(
    weights: list[int], passed: Size, more: int, asked: list[Size], gradients: int, resets: bool
) -> None:
    passes = Passes(BEFORE, STATES, resets)
    assert passes.at_most(asked) == UNKNOWN
    larger = Size(passed.clips + more, passed.frames, passed.tokens)
    for size in (passed, passed, larger):
        passes.add(size, BEFORE + gradients + activations(size, weights))
    most = max(activations(size, weights) for size in asked)
    assert passes.at_most(asked) >= BEFORE + STATES + most


@given(
    weights=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    clips=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    asked=st.lists(sizes, min_size=1, max_size=3),
    resets=st.booleans(),
)
def test_no_step_takes_more_where_the_process_keeps_what_was_freed(
    weights: list[int], clips: list[int], asked: list[Size], resets: bool
) -> None:
    passes, kept = Passes(BEFORE, STATES, resets), BEFORE
    for number in clips:
        size = Size(number, 20, 10)
        kept = max(kept, BEFORE + activations(size, weights))
        passes.add(size, kept)
    assert passes.at_most(asked) >= BEFORE + STATES + max(activations(size, weights) for size in asked)


def test_a_larger_pass_before_the_last_one_bounds_a_step_closer() -> None:
    passes, asked = Passes(BEFORE, STATES, resets=False), [Size(40, 4, 2)]
    for clips in (1, 40, 20):
        passes.add(Size(clips, 4, 2), BEFORE + 100 * 40)
    assert passes.at_most(asked) == BEFORE + STATES + 1.25 * 100 * 40


def test_activations_are_in_proportion_to_those_of_the_widest_pass_that_was_traced() -> None:
    passes = Passes(BEFORE, STATES, resets=False)
    for clips in (1, 4, 2):
        passes.add(Size(clips, 10, 2), BEFORE + 100 * 4)
    asked = [Size(2, 40, 2), Size(8, 10, 2)]
    most = passes.at_most_by(asked, lambda size: 7.0 * size.clips * size.frames)
    assert most == BEFORE + STATES + 1.25 * 100 * 8
    assert most < passes.at_most(asked), "of clips that are four times as long, sixteen times as much"


def test_what_a_long_run_keeps_counts() -> None:
    kept, returned = (Passes(BEFORE, STATES, True, spread) for spread in (2.0, 1.25))
    for passes in (kept, returned):
        passes.add(Size(1, 1, 1), BEFORE + 100)
    assert (kept.at_most([Size(2, 1, 1)]), returned.at_most([Size(2, 1, 1)])) == (1500 + 400, 1500 + 250)
    assert (kept.in_a_long_run(1900), returned.in_a_long_run(1900)) == (1900 + 300, 1900)
    assert kept.in_a_long_run(1200) == 1200, "nothing but states"


def test_gradients_do_not_count_for_each_clip_once_two_sizes_have_passed() -> None:
    asked, gradients = [Size(10, 4, 2)], 500
    found = {}
    for resets in (True, False):
        passes = Passes(BEFORE, STATES, resets)
        for clips in (1, 2, 4):
            passes.add(Size(clips, 4, 2), BEFORE + gradients + 100 * clips)
        found[resets] = passes.at_most(asked)
    assert found[True] == BEFORE + STATES + 1.25 * 1000
    assert found[False] > found[True] + 2 * gradients


def test_the_states_are_those_of_the_plan(resolve: Any, corpus: Any) -> None:
    run = resolve("model.tiny=true", "training.ema=0.9")
    module = build_translator(run, corpus, build_processor(run.recipe, corpus).tokenizer)
    trained = sum(item.numel() for item in module.parameters() if item.requires_grad)
    assert 4 * 4 * trained < states_of_a_step(module, run) < 8 * 4 * trained, "weights, gradients, moments, average"
