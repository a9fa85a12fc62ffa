"""Which micro-batches are chosen, on a machine that a stand-in for the rehearsing process describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.fitting.machine import AUTO, Machine
from toolkit.errors import UserError
from toolkit.fitting import micro_batches, stage
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.planning.hardware import GIB
from toolkit.planning.sizes.choices import Candidate
from toolkit.planning.sizes.shapes import Limits, Shape
from toolkit.recipe.choices import mark_too_large
from toolkit.recipe.resolve import ResolvedRun, read_choice


def test_a_number_is_not_touched(resolve: Any, fit: Any) -> None:
    run, machine = resolve("training.micro_batch_size=3"), Machine()
    assert fit(run, machine) == (run, [])
    assert machine.starts == 0


def test_gpus_take_the_largest_that_fits(resolve: Any, fit: Any) -> None:
    machine = Machine(breaks_at=3)
    run, lines = fit(resolve(*AUTO), machine, gpu=True)
    assert machine.steps == [6, 3, 2], "one forward pass more each time"
    assert run.clip_limit == 2
    assert "out of memory" in lines[-2]


def test_gpus_start_at_the_size_that_is_fastest_by_the_plan(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    found = [Candidate(size, Limits(size, None), seconds) for size, seconds in ((6, 3.0), (3, 1.0), (2, 2.0))]
    monkeypatch.setattr(micro_batches, "planned_candidates", lambda *_: found)
    run, _ = fit(resolve(*AUTO), machine, gpu=True)
    assert machine.steps == [3]
    assert run.clip_limit == 3
    small = Machine(breaks_at=3)
    run, lines = fit(resolve(*AUTO, "training.seed=1"), small, gpu=True)
    assert small.steps == [3, 2] and run.clip_limit == 2, "nothing as large as what did not fit"
    assert "out of memory" in lines[-2]


def test_plans_on_gpus_are_held_to_what_torch_may_reserve(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, rooms = Machine(), []

    def candidates(*arguments: Any) -> list[Candidate]:
        rooms.append(arguments[-1])
        return [Candidate(2, Limits(2, None), 1.0)]

    monkeypatch.setattr(machine, "start", lambda: Measured(resident=7 * GIB, room=50 * GIB))
    monkeypatch.setattr(micro_batches, "planned_candidates", candidates)
    fit(resolve(*AUTO), machine, gpu=True)
    assert rooms == [50 * GIB], "what the model has reserved already is in it"


def test_a_run_that_is_too_short_to_rehearse_takes_what_the_plan_says(resolve: Any, fit: Any) -> None:
    machine = Machine()
    auto = ("training.micro_batch_size=auto", "training.global_batch_size=64", "augmentation.speed=0")
    gpu, _ = fit(resolve(*auto, "training.seed=1"), machine, gpu=True, rehearses=False)
    assert gpu.clip_limit == 6, "all clips of the corpus"
    cpu, _ = fit(resolve(*auto), machine, rehearses=False)
    assert cpu.clip_limit == 6
    assert machine.starts == 0


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_generation_batches_are_halved_until_they_fit(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    """The corpus has one clip to test, of 17 frames; batches of 40 and of 20 frames hold it."""
    machine = Machine()
    monkeypatch.setattr(
        micro_batches, "generation_batches", lambda *_: [(size, [Shape(size // 10, 10)]) for size in (80, 40, 20, 10)]
    )
    machine.most_generated = 2
    run, lines = fit(resolve(*AUTO), machine, gpu=gpu)
    assert machine.generated == [8, 4, 2]
    assert run.evaluation.batch_frames == 20
    assert "20 padded frames" in lines[-2]
    machine.most_generated = 0
    least, _ = fit(resolve(*AUTO, "evaluation.num_beams=3"), machine, gpu=gpu)
    assert least.evaluation.batch_frames == 10, "one clip is tried anyway"


def test_frames_that_are_given_later_leave_the_micro_batches_as_they_are(resolve: Any, fit: Any) -> None:
    """After an evaluation ran out of memory, for instance."""
    run, _ = fit(resolve(*AUTO), Machine())
    machine = Machine(per_clip=1000.0)
    given, _ = fit(resolve(*AUTO, "evaluation.batch_frames=64"), machine)
    assert (machine.starts, given.clip_limit, given.evaluation.batch_frames) == (0, run.clip_limit, 64)


def test_a_number_of_frames_is_not_rehearsed(resolve: Any, fit: Any) -> None:
    machine = Machine()
    run, _ = fit(resolve(*AUTO, "evaluation.batch_frames=100"), machine)
    assert machine.generated == []
    assert run.evaluation.batch_frames == 100


def test_a_rehearsal_that_takes_long_shows_what_it_has_found(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SHOWN_EVERY", 0.0)
    _, lines = fit(resolve(*AUTO), Machine())
    assert "choosing micro-batches" in lines[0]
    shown = {re.search(r"frames as (\S+)", line)[1] for line in lines[1:-2] if "clips/s" in line}  # type: ignore[index]
    assert shown == {"6", "3"}
    _, again = fit(resolve(*AUTO), Machine())
    assert len(again) == 1 and "before" in again[0]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_not_even_one_clip_is_an_error_with_advice(resolve: Any, fit: Any, gpu: bool) -> None:
    with pytest.raises(UserError, match=r"training\.micro_batch_size=auto") as caught:
        fit(resolve(*AUTO), Machine(breaks_at=1), gpu=gpu)
    assert "gradient_checkpointing" in caught.value.hint


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_another_error_of_the_rehearsal_names_the_way_around_it(resolve: Any, fit: Any, gpu: bool) -> None:
    with pytest.raises(UserError, match="KeyError") as caught:
        fit(resolve(*AUTO), Machine(error=(RuntimeError, ("KeyError: 7",))), gpu=gpu)
    assert "training.micro_batch_size=8" in caught.value.hint


def test_a_users_error_in_the_rehearsal_stays_what_it_is(resolve: Any, fit: Any) -> None:
    with pytest.raises(UserError, match="mt5_bsae"):
        fit(resolve(*AUTO), Machine(error=(UserError, ("mt5_bsae", "mt5_base"))))


def test_the_same_command_in_another_folder_chooses_the_same(resolve: Any, fit: Any, tmp_path: Path) -> None:
    first, _ = fit(resolve(*AUTO), Machine())
    machine = Machine(per_clip=1000.0)  # it would choose otherwise
    second, _ = fit(resolve(*AUTO, f"run.dir={tmp_path / 'other'}"), machine)
    assert machine.starts == 0
    assert second.choice == first.choice
    other, _ = fit(resolve(*AUTO, "training.label_smoothing=0.3"), machine)
    assert (machine.starts, other.clip_limit) == (1, 1), "another recipe is measured"


def test_a_run_that_resumes_keeps_its_choice(resolve: Any, fit: Any, cache: Path) -> None:
    run, _ = fit(resolve(*AUTO), Machine())
    run.run_dir.mkdir()
    run.save(run.run_dir)
    for kept in cache.rglob("*.json"):
        kept.unlink()
    machine = Machine(per_clip=1000.0)
    again, _ = fit(resolve(*AUTO, "training.epochs=99", "training.log_every=7"), machine)
    assert machine.starts == 0
    assert again.choice == run.choice == read_choice(run.run_dir)


def test_a_run_on_other_hardware_chooses_again_and_says_so(resolve: Any, fit: Any) -> None:
    run, _ = fit(resolve(*AUTO), Machine())
    run.run_dir.mkdir()
    run.save(run.run_dir)
    machine = Machine(breaks_at=3)
    again, lines = fit(resolve(*AUTO), machine, gpu=True)
    assert (machine.starts, again.clip_limit) == (1, 2)
    assert lines[0].startswith("note:") and "other hardware" in lines[0]


def test_a_broken_file_of_an_earlier_choice_counts_as_none(resolve: Any, fit: Any, cache: Path) -> None:
    fit(resolve(*AUTO), Machine())
    for kept in cache.rglob("*.json"):
        kept.write_text('{"clips": 0')
    machine = Machine(per_clip=1000.0)
    run, _ = fit(resolve(*AUTO), machine)
    assert (machine.starts, run.clip_limit) == (1, 1)


def test_a_start_after_one_that_ran_out_of_memory_takes_smaller_ones(resolve: Any, fit: Any, tmp_path: Path) -> None:
    run, _ = fit(resolve(*AUTO), Machine())
    assert run.choice and not run.choice.is_smallest
    run.run_dir.mkdir()
    taken = []
    machine = Machine()
    for step in range(4):
        mark_too_large(run.run_dir, run.choice, f"rank 1 in step {step}")
        run, lines = fit(resolve(*AUTO), machine)
        taken.append(run.clip_limit)
        assert lines[0].startswith("note:") and f"step {step}" in lines[0]
        assert run.choice.too_large is None and f"step {step}" in run.choice.reason
        if run.choice.is_smallest:
            break
    assert taken == [3, 2, 1]
    assert machine.starts == 0, "what took less has room where more has been"
    other, _ = fit(resolve(*AUTO, f"run.dir={tmp_path / 'other'}"), machine)
    assert other.clip_limit == 1, "nor does the same command in another folder try what has failed"


def test_nothing_is_smaller_than_one_clip(resolve: Any, fit: Any) -> None:
    run, _ = fit(resolve(*AUTO), Machine(per_clip=1000.0))
    assert run.choice and run.choice.is_smallest
    run.run_dir.mkdir()
    mark_too_large(run.run_dir, run.choice, "rank 0 in step 1")
    with pytest.raises(UserError, match="rank 0 in step 1") as caught:
        fit(resolve(*AUTO), Machine())
    assert "training.gradient_checkpointing" in caught.value.hint


KEPT_OR_NOT = (*AUTO, "training.gradient_checkpointing=auto")


def test_gpus_recompute_where_nothing_else_fits_and_keep_activations_where_they_do(resolve: Any, fit: Any) -> None:
    roomy, tight, none = Machine(), Machine(breaks_at=1), Machine(breaks_at=1)
    tight.recomputing_saves = 4
    run, _ = fit(resolve(*KEPT_OR_NOT), roomy, gpu=True)
    assert (run.recomputes, run.clip_limit, roomy.recomputed) == (False, 6, [False])
    other, lines = fit(resolve(*KEPT_OR_NOT, "training.seed=1"), tight, gpu=True)
    assert (other.recomputes, other.clip_limit) == (True, 3)
    tried = list(zip(tight.steps, tight.recomputed, strict=True))
    assert tried == [(6, False), (6, True), (3, False), (3, True)], "a pass more takes longer than recomputing"
    assert "activations recomputed" in lines[-2] and other.recipe.training.gradient_checkpointing == "auto"
    with pytest.raises(UserError, match=r"training\.micro_batch_size=auto"):
        fit(resolve(*KEPT_OR_NOT, "training.seed=2"), none, gpu=True)


def test_what_the_plan_says_to_be_faster_is_rehearsed_first(
    resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [Candidate(size, Limits(size, None), seconds) for size, seconds in ((2, 2.0), (1, 4.0))]
    recomputed = [Candidate(size, Limits(size, None), seconds, True) for size, seconds in ((6, 1.5), (3, 1.6))]
    monkeypatch.setattr(micro_batches, "planned_candidates", lambda *_: [*kept, *recomputed])
    machine = Machine(breaks_at=6)
    run, lines = fit(resolve(*KEPT_OR_NOT), machine, gpu=True)
    assert list(zip(machine.steps, machine.recomputed, strict=True)) == [(6, True), (3, True)]
    assert run.recomputes and run.clip_limit == 3 and "20% less than" in lines[-2]
    smaller = Machine(breaks_at=3)
    run, _ = fit(resolve(*KEPT_OR_NOT, "training.seed=1"), smaller, gpu=True)
    assert list(zip(smaller.steps, smaller.recomputed, strict=True)) == [(6, True), (3, True), (2, False)]
    assert not run.recomputes and run.clip_limit == 2


@pytest.mark.parametrize("number", ["3", "100"])
def test_a_number_of_clips_holds_where_recomputing_is_chosen(resolve: Any, fit: Any, number: str) -> None:
    clips = min(6, int(number))
    settings = (f"training.micro_batch_size={number}", *KEPT_OR_NOT[1:])
    tight, none = Machine(breaks_at=2), Machine(breaks_at=1)
    tight.recomputing_saves = 4
    run, _ = fit(resolve(*settings), tight, gpu=True)
    assert run.recomputes and (tight.steps, tight.recomputed) == ([clips, clips], [False, True])
    assert (run.clip_limit, run.choice.is_smallest) == (clips, True)
    given, _ = fit(resolve(*settings, "training.seed=1"), none, gpu=True)
    assert given.recomputes and given.clip_limit == clips, "as without a choice: the run itself says what it lacks"


@pytest.mark.parametrize("given", [False, True], ids=["auto", "a number"])
def test_cpus_keep_activations_and_recompute_where_nothing_else_fits(resolve: Any, fit: Any, given: bool) -> None:
    settings = (*(("training.micro_batch_size=3",) if given else AUTO[:1]), *KEPT_OR_NOT[1:])
    run, _ = fit(resolve(*settings), Machine())
    assert not run.recomputes
    machine = Machine(per_clip=1.0, breaks_at=1)
    machine.recomputing_saves = 10
    tight, lines = fit(resolve(*settings, "training.seed=1"), machine, limit=0.1 if given else 100.0)
    assert tight.recomputes
    assert machine.starts == (0 if given else 2), "with a number of clips the plan decides"
    assert "activations recomputed" in lines[-1 if given else -2]


def test_true_and_false_are_not_chosen(resolve: Any, fit: Any) -> None:
    for value in (True, False):
        setting = f"training.gradient_checkpointing={str(value).lower()}"
        machine = Machine()
        run, _ = fit(resolve(*AUTO, setting), machine, gpu=True)
        assert run.recomputes is value and machine.recomputed == [value]
        number = resolve("training.micro_batch_size=3", setting)
        assert fit(number, machine, gpu=True) == (number, []) and number.recomputes is value


def test_graphs_keep_their_activations(resolve: Any, fit: Any) -> None:
    no_ctc = ("training.ctc_weight=0", "evaluation.ctc_weight=0")
    machine = Machine(breaks_at=1)
    with pytest.raises(UserError, match=r"training\.micro_batch_size=auto"):
        fit(resolve(*KEPT_OR_NOT, "training.compile=graphs", *no_ctc), machine, gpu=True)
    assert not any(machine.recomputed)


def test_a_run_that_was_out_of_memory_recomputes_at_last_and_keeps_that(resolve: Any, fit: Any) -> None:
    run, _ = fit(resolve(*KEPT_OR_NOT), Machine())
    run.run_dir.mkdir()
    taken = []
    while not run.choice.is_smallest:
        run.save(run.run_dir)
        mark_too_large(run.run_dir, run.choice, "rank 1")
        run, _ = fit(resolve(*KEPT_OR_NOT), Machine())
        taken.append((run.clip_limit, run.recomputes))
    assert taken == [(3, False), (2, False), (1, False), (1, True)] and "activations recomputed" in run.choice.reason
    run.save(run.run_dir)
    assert ResolvedRun.load(run.run_dir).recomputes
    again, _ = fit(resolve(*KEPT_OR_NOT), Machine())
    assert again.choice == run.choice
    mark_too_large(run.run_dir, run.choice, "rank 1")
    with pytest.raises(UserError, match="rank 1"):
        fit(resolve(*KEPT_OR_NOT), Machine())
