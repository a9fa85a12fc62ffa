"""Which steps of a trial are timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from toolkit.fitting.trial import AT_MOST, clips_per_second

Step = tuple[int, float, bool]  # clips, seconds, and whether something was compiled or captured


def following(steps: list[Step]) -> Callable[[], Step]:
    left = iter(steps)
    return lambda: next(left)


@pytest.mark.parametrize(
    ("taken", "speed"),
    [
        ([(8, 90.0, True), (8, 2.0, False), (8, 6.0, False)], 2.0),
        ([(8, 90.0, True), (8, 50.0, True), (8, 2.0, False), (8, 40.0, True), (8, 6.0, False)], 2.0),
        ([(8, 90.0, True), *([(8, 16.0, True)] * 7), (8, 2.0, False)], 4.0),
        ([(8, 90.0, True), *([(8, 16.0, True)] * 8)], 0.5),
    ],
    ids=["none is compiled", "others instead", "one is left", "each compiles"],
)
def test_a_step_in_which_a_layer_is_compiled_is_replaced(taken: list[Step], speed: float) -> None:
    assert AT_MOST == 4, "so many steps are given here"
    assert clips_per_second(following(taken), steps=3) == speed
