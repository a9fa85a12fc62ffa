"""Which micro-batches CPUs take: the fastest of those that fit, on a machine that a stand-in describes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.fitting.machine import AUTO, Machine
from toolkit.fitting import fastest, stage


def test_cpus_take_the_fastest(resolve: Any, fit: Any) -> None:
    run, lines = fit(resolve(*AUTO), Machine())
    assert (run.clip_limit, run.frame_limit, run.accumulation_steps) == (6, None, 1)
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == 6
    assert run.recipe.training.micro_batch_size == "auto"
    assert "6 clips" in lines[-2]


@pytest.mark.parametrize(
    ("few", "per_clip", "times", "chosen"),
    [
        (2, 0.0, [2, 6], 6),
        (2, 1000.0, [1, 2, 6], 1),  # all are about as fast: the smallest takes the least memory
        (6, 1000.0, [1, 3, 6], 1),
        (6, 0.0, [3, 6], 6),
        (0, 0.0, [1, 2, 6], 6),
    ],
)
def test_cpus_time_two_sizes_and_what_is_fastest_by_their_line(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch, few: int, per_clip: float, times: list[int], chosen: int
) -> None:
    monkeypatch.setattr(fastest, "FEW", few)
    machine = Machine(per_clip=per_clip)
    run, lines = fit(resolve(*AUTO), machine)
    assert run.clip_limit == chosen
    asked = [int(number) for number in re.findall(r"with (\d)", lines[-2])]
    assert asked == times
    assert len(machine.timed) <= 1 + 3 * len(times), "one to warm up, and each of them again"


@pytest.mark.parametrize("slow", [set(), {3}])
def test_a_size_that_cannot_be_faster_is_not_timed(resolve: Any, fit: Any, monkeypatch: Any, slow: set[int]) -> None:
    monkeypatch.setattr(fastest, "FEW", 0)
    machine = Machine(per_clip=1000.0)
    machine.slow_passes = slow
    run, _ = fit(resolve(*AUTO), machine)
    assert (run.clip_limit, 6 in machine.timed) == (1, False), "passes of 1 and 2 clips are proportional"


@pytest.mark.parametrize("few", [2, 8])
@pytest.mark.parametrize("slow", [{1}, {2}, {3}, {4}, {2, 3, 4}])
def test_a_pass_that_another_process_has_slowed_does_not_count(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch, slow: set[int], few: int
) -> None:
    monkeypatch.setattr(fastest, "FEW", few)
    machine = Machine()
    machine.slow_passes = slow
    run, _ = fit(resolve(*AUTO), machine)
    assert run.clip_limit == 6


@pytest.mark.parametrize(("limit", "space"), [(3.5, None), (100.0, 7.5)], ids=["memory", "addresses"])
def test_cpus_keep_to_the_limit_without_trying_what_is_too_large(
    resolve: Any, fit: Any, limit: float, space: float | None
) -> None:
    machine = Machine()
    run, lines = fit(resolve(*AUTO), machine, limit=limit, space=space)
    assert run.clip_limit == 3
    assert max(machine.steps) == 3
    assert "more than 3 of the longest clips do not fit" in lines[-2]


def test_no_step_is_tried_where_any_fits_by_the_passes(resolve: Any, fit: Any) -> None:
    machine = Machine()
    machine.at_most_gib = 3.0
    run, lines = fit(resolve(*AUTO), machine, limit=20.0)
    assert (machine.steps, run.clip_limit) == ([], 6)
    assert "at most 18.00 of 20.00 GiB" in lines[-2]
    narrow = Machine()
    narrow.at_most_gib = 3.0
    run, _ = fit(resolve(*AUTO, "training.label_smoothing=0.3"), narrow, limit=17.0)
    assert (narrow.steps, run.clip_limit) == ([1, 2, 6], 6), "what may not fit is tried"
    limited = Machine()
    limited.at_most_gib = 3.0
    fit(resolve(*AUTO, "training.label_smoothing=0.2"), limited, limit=20.0, space=100.0)
    assert limited.steps == [1, 2, 6], "addresses are not known by passes"


def test_a_pass_is_taken_where_those_before_show_that_it_fits(resolve: Any, fit: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(fastest, "FEW", 2)
    machine = Machine()
    machine.at_most_gib = 3.0
    run, lines = fit(resolve(*AUTO), machine, limit=7.0)
    # A pass of 2 clips is shown to fit, one of 6 is not: the two smallest sizes show the growth, in a new process.
    assert (machine.timed[:2], machine.steps, run.clip_limit) == ([1, 2], [1, 2, 6], 6)
    assert machine.closed == 2, "once before the growth is measured, and at the end"
    assert "took 6.00 of 7.00 GiB" in lines[-2]


def test_a_traced_pass_shows_that_a_step_fits_where_the_passes_do_not(resolve: Any, fit: Any) -> None:
    machine = Machine()
    machine.at_most_gib, machine.heaviest_at_most_gib, machine.traced_gib = 1.0, 100.0, 2.0
    run, lines = fit(resolve(*AUTO), machine, limit=13.0)
    assert (machine.steps, run.clip_limit, machine.closed) == ([], 6, 1)
    assert "takes at most 12.00 of 13.00 GiB" in lines[-2]
    narrow = Machine()
    narrow.at_most_gib, narrow.heaviest_at_most_gib, narrow.traced_gib = 1.0, 100.0, 2.0
    run, lines = fit(resolve(*AUTO, "training.label_smoothing=0.3"), narrow, limit=11.0)
    assert (narrow.steps, run.clip_limit) == ([1, 2, 6], 6), "what may not fit is tried"


def test_a_run_that_keeps_freed_memory_takes_the_largest_that_fits_by_traced_passes(
    resolve: Any, fit: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stage, "keeps_memory", lambda: True)
    machine = Machine()
    machine.at_most_gib, machine.heaviest_at_most_gib, machine.traced_gib = 1.0, 100.0, 2.0
    run, lines = fit(resolve(*AUTO), machine, limit=7.0)
    assert (machine.steps, run.clip_limit) == ([], 3)
    assert "takes at most 6.00 of 7.00 GiB" in lines[-2] and "more than 3 of the longest" in lines[-2]


def test_a_run_that_keeps_freed_memory_leaves_out_passes_that_are_not_shown_to_fit(
    resolve: Any, fit: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stage, "keeps_memory", lambda: True)
    monkeypatch.setattr(fastest, "FEW", 2)
    machine = Machine()
    machine.at_most_gib = 3.0
    run, _ = fit(resolve(*AUTO), machine, limit=10.0)
    assert (set(machine.timed), machine.steps, run.clip_limit) == ({1, 2, 3}, [], 3)
    tight = Machine()
    tight.at_most_gib = 3.0
    run, _ = fit(resolve(*AUTO, "training.label_smoothing=0.3"), tight, limit=4.0)
    assert tight.steps[:2] == [1, 2], "nothing could be timed: steps show what fits"


def test_the_heaviest_micro_batches_are_asked_about_only_when_a_size_is_chosen(resolve: Any, fit: Any) -> None:
    machine = Machine()
    machine.at_most_gib = 1.0
    passes: list[bool] = []
    plain = machine.passes
    machine.passes = lambda shape: passes.append(machine.heaviest_asked) or plain(shape)  # type: ignore[method-assign]
    fit(resolve(*AUTO), machine)
    assert machine.heaviest_asked and not any(passes)


def test_cpus_take_a_pass_more_where_the_growth_was_misjudged(resolve: Any, fit: Any) -> None:
    machine = Machine(breaks_at=6)
    run, _ = fit(resolve(*AUTO), machine)
    assert machine.steps == [1, 2, 6, 3]
    assert run.clip_limit == 3
