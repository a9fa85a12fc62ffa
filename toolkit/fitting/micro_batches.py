"""``training.micro_batch_size: auto``: the micro-batches of a run, chosen on the hardware that is there.

On GPUs larger ones are faster: the largest that fits by the plan is rehearsed, then smaller ones until one fits. On
CPUs caches and padding decide: the fastest of those that fit is taken. All ranks compare what they found after each
rehearsal, and so make the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from toolkit.cluster.ops import build_missing_ops, needed_ops
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange, on_each_node, on_rank_0
from toolkit.corpus.packed import Corpus
from toolkit.fitting.fastest import fastest
from toolkit.fitting.hardware import GIB, Card, cards, describe, room_for_tensors
from toolkit.fitting.kept_choices import earlier_choice, settings_hash
from toolkit.fitting.planned_size import planned_size, room_for_activations
from toolkit.fitting.shapes import (
    Lengths,
    Limits,
    generation_batches,
    lengths_of,
    limits_of,
    next_smaller,
    sizes,
)
from toolkit.fitting.stage import Echo, Stage, nothing_fits
from toolkit.models.build import fetch_backbone
from toolkit.recipe.batches import MicroBatchChoice, most_batch_frames
from toolkit.recipe.choices import choices_folder, keep_choice
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.engine import import_libraries
from toolkit.training.out_of_memory import mark_if_killed

FEW = 8  # clips of a micro-batch without a rehearsal, on CPUs


def fit_micro_batches(
    resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, echo: Echo, *, resumes: bool = True, rehearses: bool = True
) -> ResolvedRun:
    """The run with micro-batches of a known size; all ranks call this before they have a process group or threads.

    Args:
        resolved: unchanged where its recipe gives a number.
        ranks, corpus: of the run.
        echo: prints a line on rank 0.
        resumes: whether the choice of the run in ``run_dir``, if any, is taken again.
        rehearses: whether the run is long enough for a rehearsal; else the plan decides alone.

    Raises:
        UserError: not one clip fits, or the model cannot be built.
    """
    if resolved.recipe.training.micro_batch_size != "auto":
        return resolved
    found = on_each_node(cards)
    hardware, settings = on_rank_0(lambda: (describe(ranks, found), settings_hash(resolved, corpus)))
    if resumes:
        on_rank_0(lambda: mark_if_killed(resolved.run_dir))
    choice, note = on_rank_0(lambda: earlier_choice(resolved.run_dir if resumes else None, hardware, settings))
    if note:
        echo(f"note: {note}")
    lengths = lengths_of(resolved, corpus.splits["train"])
    if choice and choice.too_large:
        echo(f"note: a run ran out of memory with micro-batches of {_limits(choice)}: {choice.too_large}")
        smaller = _smaller(choice, lengths, resolved)
        choice = on_rank_0(lambda: keep_choice(smaller))
    if choice:
        echo(f"as chosen before: {choice.in_words()}")
        return resolved.with_choice(choice)
    if rehearses:
        size, reason, batch_frames = _rehearsed(resolved, ranks, corpus, lengths, echo, has_gpu=bool(found))
    else:
        (size, reason), batch_frames = _planned(resolved, lengths, found), None
    limits = limits_of(size, lengths)
    choice = MicroBatchChoice(limits.clips, limits.frames, reason, hardware, settings, batch_frames, size == 1)
    echo(choice.in_words())
    if rehearses:
        own = choice
        choice = on_rank_0(lambda: keep_choice(own))
        echo(f"  the next run of these settings here takes the same; to choose again, remove {choices_folder()}")
    return resolved.with_choice(choice)


def _rehearsed(
    resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, echo: Echo, *, has_gpu: bool
) -> tuple[int, str, int | None]:
    """The size that a rehearsal chooses, why, and the frames of generation batches where they are chosen, too."""
    echo("training.micro_batch_size=auto: choosing micro-batches by a rehearsal on this hardware")
    on_each_node(lambda: build_missing_ops(needed_ops(resolved.deepspeed), lambda line: echo(f"note: {line}")))
    on_each_node(lambda: fetch_backbone(resolved.recipe.model))
    if not has_gpu:
        import_libraries(resolved)  # the run needs them, too, and the fork has them then
    stage = Stage.of(resolved, ranks, corpus, lengths, echo, has_gpu=has_gpu)
    try:
        size, reason = _largest(stage, resolved) if has_gpu else fastest(stage, resolved, corpus.splits["train"])
        return size, reason, _batch_frames(stage, resolved, corpus)
    finally:
        stage.rehearsal.close()


def _planned(resolved: ResolvedRun, lengths: Lengths, found: Sequence[Card]) -> tuple[int, str]:
    """The size for a run that is too short to rehearse: on GPUs the plan's largest, on CPUs few clips."""
    candidates = sizes(lengths.share)
    if not found:
        return next(size for size in candidates if size <= FEW), f"at most {FEW}, without a rehearsal"
    room = min(exchange(min(room_for_tensors(card, resolved.world_size) for card in found)))
    size = on_rank_0(lambda: planned_size(resolved, lengths, candidates, room))
    return size, f"the most that fit {room / GIB:.2f} GiB of a GPU by the plan, without a rehearsal"


def _batch_frames(stage: Stage, resolved: ResolvedRun, corpus: Corpus) -> int | None:
    """Padded frames of generation batches where the recipe says ``auto``: the most that fit beside what trains."""
    settings = resolved.recipe.evaluation
    if settings.batch_frames != "auto":
        return None
    candidates = generation_batches(corpus, most_batch_frames(settings))
    for size, shapes in candidates:
        _, problem = stage.agreed(*stage.translation(shapes))
        if not problem:
            return size
        stage.show(f"generation batches of {size} padded frames do not fit ({problem})")
    return candidates[-1][0]  # one clip at a time: an evaluation has other memory than a rehearsal


def _smaller(choice: MicroBatchChoice, lengths: Lengths, resolved: ResolvedRun) -> MicroBatchChoice:
    """What a run takes after it ran out of memory.

    Raises:
        UserError: there are no smaller ones.
    """
    size = next_smaller(Limits(choice.clips, choice.frames), lengths)
    if size is None:
        raise nothing_fits(resolved, choice.too_large)
    limits = limits_of(size, lengths)
    return replace(
        choice,
        clips=limits.clips,
        frames=limits.frames,
        reason=f"the next smaller size; {_limits(choice)} ran out of memory ({choice.too_large})",
        is_smallest=size == 1,
        too_large=None,
    )


def _limits(choice: MicroBatchChoice) -> str:
    return f"at most {choice.clips} clips" + (f" and {choice.frames} padded frames" if choice.frames else "")


def _largest(stage: Stage, resolved: ResolvedRun) -> tuple[int, str]:
    """On GPUs: the plan's largest size, or the next smaller one that a rehearsal fits."""
    started, problem = stage.agreed(stage.rehearsal.start())
    room = min(measured.resident + measured.room for measured in started)
    candidates = sizes(stage.lengths.share)
    by_plan = candidates[0] if problem else on_rank_0(lambda: planned_size(resolved, stage.lengths, candidates, room))
    problems: list[str] = []
    for size in candidates[candidates.index(by_plan) :]:
        measured, problem = stage.agreed(*stage.step(size))
        if not problem:
            took = max(one.resident for one in measured) / GIB
            tried = f"; {problems[-1]}" if problems else ""
            if note := on_rank_0(partial(room_for_activations, resolved, stage.lengths, size, room)):
                stage.echo(f"note: {note}")
            return size, f"a rehearsal of the heaviest took {took:.2f} of {room / GIB:.2f} GiB of a GPU{tried}"
        problems.append(f"{size} of the longest clips did not fit ({problem})")
        stage.show(problems[-1])
    raise nothing_fits(resolved, problem)
