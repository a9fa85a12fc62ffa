"""Which micro-batches are chosen, on a machine that a stand-in for the rehearsing process describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.fitting import fastest, micro_batches, stage
from toolkit.fitting.bounds import UNKNOWN
from toolkit.fitting.hardware import GIB, Card
from toolkit.fitting.memory_limits import MemoryLimit
from toolkit.fitting.micro_batches import fit_micro_batches
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.fitting.shapes import Shape
from toolkit.recipe.choices import mark_too_large
from toolkit.recipe.resolve import ResolvedRun, read_choice

AUTO = ("training.micro_batch_size=auto", "training.global_batch_size=6", "augmentation.speed=0")


class Machine:
    """Takes a GiB for each clip of the widest step it has had, and 1 second plus ``per_clip`` for a pass."""

    def __init__(self, per_clip: float = 0.0, breaks_at: int = 10**9, error: Any = None) -> None:
        self.per_clip, self.breaks_at, self.error = per_clip, breaks_at, error
        self.steps: list[int] = []
        self.widest = 0
        self.starts = self.closed = 0
        self.most_generated = 10**9
        self.generated: list[int] = []
        self.timed: list[int] = []
        self.slow_passes: set[int] = set()  # by their number, from 1: another process ran beside them
        self.heaviest_asked = False
        self.at_most_gib: float | None = None  # for each clip of a step that was not taken; None = not known
        self.traced_gib: float | None = None  # the same by a traced pass

    def __call__(self, *_: Any, **__: Any) -> Machine:
        self.starts += 1
        return self

    def start(self) -> Measured:
        return Measured(room=100 * GIB, error=self.error)

    def step(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        self.steps.append(clips)
        if clips >= self.breaks_at:
            return Measured(problem="out of memory")
        self.widest = max(self.widest, clips)
        return Measured(resident=self.widest * GIB, address_space=2 * self.widest * GIB, error=self.error)

    def at_most(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        self.heaviest_asked |= any(shape.long_texts for shape in shapes)
        most = UNKNOWN if self.at_most_gib is None else int(clips * self.at_most_gib * GIB)
        return Measured(resident=most, address_space=UNKNOWN)

    def traced(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        most = UNKNOWN if self.traced_gib is None else int(clips * self.traced_gib * GIB)
        return Measured(resident=most, address_space=UNKNOWN)

    def translation(self, shapes: Sequence[Shape]) -> Measured:
        clips = max(shape.clips for shape in shapes)
        self.generated.append(clips)
        return Measured(problem="out of memory" if clips > self.most_generated else None)

    def passes(self, shape: Shape) -> Measured:
        self.timed.append(shape.clips)
        seconds = 1.0 + self.per_clip * shape.clips
        return Measured(seconds=100.0 * seconds if len(self.timed) in self.slow_passes else seconds)

    def close(self) -> None:
        self.widest = 0
        self.closed += 1


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> Callable[..., tuple[ResolvedRun, list[str]]]:
    """Fits a run to a machine; gives the run and the lines on the terminal."""

    def fit(
        run: ResolvedRun,
        machine: Machine,
        *,
        limit: float = 100.0,
        space: float | None = None,
        gpu: bool = False,
        rehearses: bool = True,
    ) -> tuple[ResolvedRun, list[str]]:
        lines: list[str] = []
        monkeypatch.setattr(stage, "Rehearsal", machine)
        monkeypatch.setattr(micro_batches, "cards", lambda: [Card("H100", 80 * GIB, 70 * GIB)] if gpu else [])
        monkeypatch.setattr(micro_batches, "build_missing_ops", lambda *_: None)
        monkeypatch.setattr(micro_batches, "import_libraries", lambda _: None)  # no engine is built
        monkeypatch.setattr(
            stage,
            "memory_limit",
            lambda _: MemoryLimit(int(limit * GIB), None if space is None else int(space * GIB)),
        )
        return fit_micro_batches(run, Ranks(), corpus, lines.append, rehearses=rehearses), lines

    return fit


def test_a_number_is_not_touched(resolve: Any, fit: Any) -> None:
    run, machine = resolve("training.micro_batch_size=3"), Machine()
    assert fit(run, machine) == (run, [])
    assert machine.starts == 0


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


def test_a_traced_pass_shows_that_a_step_fits_where_the_passes_do_not(resolve: Any, fit: Any, monkeypatch: Any) -> None:
    machine = Machine()
    machine.at_most_gib, machine.traced_gib = 1.0, 2.0
    plain = machine.at_most
    heavier = lambda shapes: Measured(resident=UNKNOWN) if shapes[0].long_texts else plain(shapes)  # noqa: E731
    monkeypatch.setattr(machine, "at_most", heavier)
    run, lines = fit(resolve(*AUTO), machine, limit=13.0)
    assert (machine.steps, run.clip_limit, machine.closed) == ([], 6, 1)
    assert "takes at most 12.00 of 13.00 GiB" in lines[-2]
    narrow = Machine()
    narrow.at_most_gib, narrow.traced_gib = 1.0, 2.0
    monkeypatch.setattr(narrow, "at_most", heavier)
    run, lines = fit(resolve(*AUTO, "training.label_smoothing=0.3"), narrow, limit=11.0)
    assert (narrow.steps, run.clip_limit) == ([1, 2, 6], 6), "what may not fit is tried"


def test_a_run_that_keeps_freed_memory_takes_the_largest_that_fits_by_traced_passes(
    resolve: Any, fit: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stage, "keeps_memory", lambda: True)
    machine = Machine()
    machine.at_most_gib, machine.traced_gib = 1.0, 2.0
    plain = machine.at_most
    heavier = lambda shapes: Measured(resident=UNKNOWN) if shapes[0].long_texts else plain(shapes)  # noqa: E731
    monkeypatch.setattr(machine, "at_most", heavier)
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


def test_gpus_take_the_largest_that_fits(resolve: Any, fit: Any) -> None:
    machine = Machine(breaks_at=3)
    run, lines = fit(resolve(*AUTO), machine, gpu=True)
    assert machine.steps == [6, 3, 2], "one forward pass more each time"
    assert run.clip_limit == 2
    assert "out of memory" in lines[-2]


def test_gpus_start_at_the_size_of_the_plan(resolve: Any, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(micro_batches, "planned_size", lambda run, lengths, candidates, room: candidates[2])
    run, _ = fit(resolve(*AUTO), machine, gpu=True)
    assert machine.steps == [2]
    assert run.clip_limit == 2


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
