"""A plan says where activations are recomputed for which there is room."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from toolkit.planning.comparison import Row, compare
from toolkit.planning.hardware import GIB, Hardware
from toolkit.planning.plan import make_plan
from toolkit.planning.recomputation import NeedlessRecomputation
from toolkit.planning.subject import Subject
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import from_maxima
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import resolve_named

RECIPE = load_recipe("t5_3b_lora")
WORKLOAD = from_maxima(RECIPE)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(RECIPE)


def found_on(
    subject: Subject, gib: int, *settings: str, wanted: str = "training.gradient_checkpointing=true"
) -> NeedlessRecomputation | None:
    """What the plan of the recipe says on one GPU, and that its table says the same."""
    settings = (wanted, *settings)
    run = resolve_named("t5_3b_lora", [*settings], 1, has_gpu=True, ds="zero1", needs_data=False)
    hardware = Hardware(1, gib * GIB)
    comparison = compare(subject, {"zero1": run}, hardware, WORKLOAD, "zero1")
    found = comparison.recomputation
    words = ["t5_3b_lora", *settings]
    text, table = (
        as_text(comparison, subject, hardware, WORKLOAD, words),
        as_dict(comparison, RECIPE, hardware, WORKLOAD, words),
    )
    assert found is None or found.in_words() in text
    assert table["recomputation"] == (found and asdict(found))
    return found


def test_a_large_card_needs_no_recomputation(subject: Subject) -> None:
    large, small = found_on(subject, 140), found_on(subject, 80)
    assert large and small and large.clips > small.clips
    assert 0.15 < small.saved <= large.saved < 0.4, "a pass more is a third of the products, or less of a step"
    run = resolve_named(
        "t5_3b_lora", ["training.gradient_checkpointing=false"], 1, has_gpu=True, ds="zero1", needs_data=False
    )
    plan = make_plan(subject, run, Hardware(1, 80 * GIB), WORKLOAD, micro_batch_size=small.clips)
    assert plan.total / GIB == pytest.approx(small.gib) and small.gib < 80


def test_nothing_is_said_of_a_small_card_and_of_a_run_that_keeps_activations(subject: Subject) -> None:
    assert found_on(subject, 9) is None
    for other in ("false", "auto"):
        assert found_on(subject, 80, wanted=f"training.gradient_checkpointing={other}") is None


@pytest.mark.parametrize(("gib", "recomputes"), [(9, True), (80, False), (140, False)])
def test_auto_keeps_activations_where_that_is_faster_among_what_fits(
    subject: Subject, gib: int, recomputes: bool
) -> None:
    def planned(wanted: str) -> Row:
        setting = f"training.gradient_checkpointing={wanted}"
        run = resolve_named("t5_3b_lora", [setting], 1, has_gpu=True, ds="zero1", needs_data=False)
        return compare(subject, {"zero1": run}, Hardware(1, gib * GIB), WORKLOAD, "zero1").rows[0]

    auto, kept, recomputed = map(planned, ("auto", "false", "true"))
    assert auto.recomputes is recomputes and auto == (recomputed if recomputes else kept)
    assert auto.seconds == min(row.seconds for row in (kept, recomputed) if row.seconds is not None)
    run = resolve_named("t5_3b_lora", [], 1, has_gpu=True, ds="zero1", needs_data=False)
    hardware = Hardware(1, gib * GIB)
    comparison = compare(subject, {"zero1": run}, hardware, WORKLOAD, "zero1")
    said = "recomputed" if recomputes else "kept"
    assert f"activations are {said}" in as_text(comparison, subject, hardware, WORKLOAD, ["t5_3b_lora"])
    assert as_dict(comparison, RECIPE, hardware, WORKLOAD, ["t5_3b_lora"])["jsons"][0]["recomputes"] is recomputes
