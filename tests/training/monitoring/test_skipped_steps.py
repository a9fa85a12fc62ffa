"""A warning of steps without a finite gradient: once for several in a row, and none in fp16."""

from __future__ import annotations

import math

import pytest

from toolkit.training.monitoring.skipped_steps import SkippedSteps

NORMS = [1.0, math.inf, math.nan, None, math.nan, 2.0, math.inf]  # None: the engine knows none


@pytest.mark.parametrize(("may_overflow", "warned"), [(False, [2, 5, 7]), (True, [])])
def test_the_first_of_several_is_a_warning(may_overflow: bool, warned: list[int]) -> None:
    steps = SkippedSteps(may_overflow=may_overflow)
    found = {step: steps.see(step, norm) for step, norm in enumerate(NORMS, start=1)}
    assert [step for step, text in found.items() if text] == warned
    assert all(f"step {step} " in (found[step] or "") for step in warned)
