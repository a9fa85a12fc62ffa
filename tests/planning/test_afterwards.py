"""Plans of runs that were measured, and advice for those that failed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.small_runs import corpus, resolve
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.planning import afterwards
from toolkit.planning.afterwards import Computed, advice_within, by_gain, planned_cpu_phases, planned_phases
from toolkit.planning.comparison import Advice
from toolkit.planning.cpu_plan import make_cpu_plan
from toolkit.planning.hardware import CPU_LIBRARIES, GIB, Hardware
from toolkit.planning.plan import PHASES, make_plan
from toolkit.planning.subject import Subject

__all__ = ["corpus", "resolve"]

H100 = Hardware(gpus=1, gpu_memory=80 * GIB)
LARGE = Computed(16, 300, 60)
SMALL = ("model.tiny=true", "model.from_scratch=true", "training.micro_batch_size=16")


def test_the_largest_phase_is_what_the_plan_says_that_torch_allocates(resolve: Any, corpus: Corpus) -> None:
    run = resolve(*SMALL)
    phases = planned_phases(run, corpus, H100, LARGE, rows=300)
    plan = make_plan(Subject.of(run.recipe, 300), run, H100, LARGE.workload(corpus, run), micro_batch_size=16)
    assert tuple(phases) == PHASES
    assert max(phases.values()) == pytest.approx(plan.allocated)


def test_the_plan_is_that_of_the_micro_batches_that_were_computed(resolve: Any, corpus: Corpus) -> None:
    run = resolve(*SMALL)
    small, large = (planned_phases(run, corpus, H100, size, 300) for size in (Computed(2, 30, 8), LARGE))
    assert small["step"] < large["step"] - 2**25
    assert small["save"] == large["save"]
    later = Computed(16, 300, 60, later=16 * 200)
    assert later.workload(corpus, run).later_frames == 200


def test_the_longest_clips_and_texts_of_different_micro_batches_are_not_added(resolve: Any, corpus: Corpus) -> None:
    run = resolve(*SMALL)
    frames, tokens = (16, 300, 10), (16, 40, 100)
    both = Computed(16, 300, 100)
    (together, *separate) = (
        planned_phases(run, corpus, H100, computed, 300)["step"]
        for computed in (
            both,
            replace(both, first_shapes=(frames,)),
            replace(both, first_shapes=(tokens,)),
            replace(both, first_shapes=(frames, tokens)),
        )
    )
    assert max(separate[:2]) == separate[2] < together - 2**20
    stored = json.loads(json.dumps(asdict(replace(both, first_shapes=(frames, tokens)))))
    assert planned_phases(run, corpus, H100, Computed.from_dict(stored), 300)["step"] == separate[2]


def test_evaluations_are_planned_as_they_are_padded(
    resolve: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afterwards, "fitted_rungs", lambda frames, per_position: (16,))
    run = resolve(*SMALL, "evaluation.batch_frames=8")
    on_gpu, on_cpu = (LARGE.workload(corpus, run, on_gpu=kind).evaluated for kind in (True, False))
    assert set(on_cpu) == {(1, 8), (1, 13)}
    assert set(on_gpu) == {(1, 16)}, "to few lengths on GPUs alone"


def test_a_process_is_planned_with_its_own_libraries_and_with_what_its_heap_may_lose(
    resolve: Any, corpus: Corpus
) -> None:
    run = resolve(*SMALL)
    returned, kept = (
        make_cpu_plan(Subject.of(run.recipe, 300), run, LARGE.workload(corpus, run), micro_batch_size=16, keeps=keeps)
        for keeps in (False, True)
    )
    least, most = planned_cpu_phases(run, corpus, LARGE, 300, libraries=3.0 * GIB, keeps=True)
    assert tuple(least) == tuple(most) == PHASES
    for phase in PHASES:
        assert least[phase] == pytest.approx(returned.phases[phase] - CPU_LIBRARIES + 3 * GIB)
        assert most[phase] == pytest.approx(kept.phases[phase] - CPU_LIBRARIES + 3 * GIB)
    assert most["step"] > least["step"] + 2**20 and most["save"] == least["save"]
    assert kept.items["free blocks of the heap"] >= returned.items["activations"]
    assert planned_cpu_phases(run, corpus, LARGE, 300, libraries=3.0 * GIB, keeps=False)[1] == least


def test_advice_is_for_the_phase_that_failed(resolve: Any, corpus: Corpus) -> None:
    (first,) = advice_within(0, resolve(*SMALL), corpus, H100, LARGE, "step")
    assert first.settings == "training.gradient_checkpointing=true" and first.gain > 2**24
    assert advice_within(0, resolve(*SMALL), corpus, H100, LARGE, "evaluation") == [], "it saves nothing there"


def test_chosen_micro_batches_are_a_number_in_the_plan(resolve: Any, corpus: Corpus) -> None:
    run = resolve(*SMALL[:2], "training.micro_batch_size=auto", "training.global_batch_size=512")
    number = resolve(*SMALL, "training.global_batch_size=512")
    (chosen,), (given,) = (advice_within(0, one, corpus, H100, LARGE, "step") for one in (run, number))
    assert chosen == given


def test_advice_ends_when_its_time_is_over(resolve: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = [Advice("one", "a=1", GIB, True), Advice("another", "b=1", 2 * GIB, True)]
    monkeypatch.setattr(afterwards, "advice_for", lambda *_: iter(gains))
    assert advice_within(0.0, resolve(*SMALL), corpus, H100, LARGE, "step") == gains[:1]
    assert advice_within(60.0, resolve(*SMALL), corpus, H100, LARGE, "step") == gains[::-1]


def test_a_model_that_cannot_be_traced_gets_none(resolve: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("cannot be traced")
        yield

    monkeypatch.setattr(afterwards, "advice_for", refuse)
    assert advice_within(60.0, resolve(*SMALL), corpus, H100, LARGE, "step") == []


def test_what_saves_nothing_is_no_advice() -> None:
    advice = [Advice("x", "a=1", 0.0, True), Advice("all of them but offloading", "b=1", 9.0 * GIB, True)]
    assert by_gain(advice) == []
