"""``training.micro_batch_size: auto`` and ``training.gradient_checkpointing: auto``: the micro-batches of a run, and
whether their activations are recomputed, chosen on the hardware that is there.

On GPUs larger ones launch less and pad more: of those that fit by the plan the one in which it says the first epoch to
be computed fastest is rehearsed, then smaller ones until one fits. On CPUs caches and padding decide, and passes are
timed; activations are recomputed where nothing else fits. All ranks compare what they found after each rehearsal, and
so make the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from toolkit.cluster.ops import build_missing_ops, needed_ops
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange, on_each_node, on_rank_0
from toolkit.corpus.packed import Corpus, Split
from toolkit.fitting.fastest import fastest
from toolkit.fitting.hardware import GIB, Card, cards, describe, room_for_tensors
from toolkit.fitting.kept_choices import earlier_choice, settings_hash
from toolkit.fitting.planned_size import keeps_activations, planned_candidates, room_for_activations
from toolkit.fitting.stage import Echo, NothingFits, Stage, nothing_fits
from toolkit.models.build import fetch_backbone
from toolkit.planning.sizes import choices
from toolkit.planning.sizes.choices import Candidate
from toolkit.planning.sizes.shapes import (
    Lengths,
    Limits,
    generation_batches,
    lengths_of,
    limits_of,
    next_smaller,
)
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
        resolved: unchanged where its recipe gives a number of clips and says whether activations are recomputed.
        ranks, corpus: of the run.
        echo: prints a line on rank 0.
        resumes: whether the choice of the run in ``run_dir``, if any, is taken again.
        rehearses: whether the run is long enough for a rehearsal; else the plan decides alone.

    Raises:
        UserError: not one clip fits, or the model cannot be built.
    """
    training = resolved.recipe.training
    if "auto" not in (training.micro_batch_size, training.gradient_checkpointing):
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
    rehearses &= bool(found) or training.micro_batch_size == "auto"  # a plan costs less than a start
    batch_frames = None
    if rehearses:
        chosen, reason, batch_frames = _rehearsed(resolved, ranks, corpus, lengths, echo, has_gpu=bool(found))
    else:
        chosen, reason = _planned(resolved, ranks, corpus, lengths, found)
    choice = MicroBatchChoice(
        clips=chosen.limits.clips,
        frames=chosen.limits.frames,
        reason=reason,
        hardware=hardware,
        settings=settings,
        batch_frames=batch_frames,
        is_smallest=_next(resolved, chosen.limits, lengths, recomputes=chosen.recomputes) is None,
        recomputes=chosen.recomputes,
    )
    echo(choice.in_words())
    if rehearses:
        own = choice
        choice = on_rank_0(lambda: keep_choice(own))
        echo(f"  the next run of these settings here takes the same; to choose again, remove {choices_folder()}")
    return resolved.with_choice(choice)


def _rehearsed(
    resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, echo: Echo, *, has_gpu: bool
) -> tuple[Candidate, str, int | None]:
    """What a rehearsal chooses, why, and the frames of generation batches where they are chosen, too."""
    echo(f"{resolved.chosen_settings}: choosing micro-batches by a rehearsal on this hardware")
    on_each_node(lambda: build_missing_ops(needed_ops(resolved.deepspeed), lambda line: echo(f"note: {line}")))
    on_each_node(lambda: fetch_backbone(resolved.recipe.model))
    split = corpus.splits["train"]
    if has_gpu:
        with closing(Stage.of(resolved, ranks, corpus, lengths, echo, has_gpu=True)) as stage:
            chosen, reason = _rehearsed_on_gpu(stage, resolved, ranks, split)
            return chosen, reason, _batch_frames(stage, resolved, corpus)
    import_libraries(resolved)  # the run needs them, too, and the fork has them then
    for recomputes in resolved.may_recompute:
        run = resolved.recomputing(recomputes)
        with closing(Stage.of(run, ranks, corpus, lengths, echo, has_gpu=False)) as stage:
            try:
                size, reason = fastest(stage, run, split)
            except NothingFits:
                if recomputes is resolved.may_recompute[-1]:
                    raise
                echo("  rehearsal: with activations that are kept not one of the longest clips fits")
                continue
            chosen = Candidate(size, limits_of(size, lengths), recomputes=recomputes)
            return chosen, reason, _batch_frames(stage, run, corpus)
    raise AssertionError("the last one is returned or raised")


def _planned(
    resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, found: Sequence[Card]
) -> tuple[Candidate, str]:
    """What is taken without a rehearsal: on GPUs what is fastest by the plan, on CPUs few clips."""
    if not found:
        given, every = resolved.has_given_clips, choices.families(resolved, lengths)[0]
        candidate = next(one for one in every if given or one.size <= FEW)
        how = "as the recipe says" if given else f"at most {FEW}"
        recomputes = not keeps_activations(resolved, ranks, lengths, candidate.limits)
        return replace(candidate, recomputes=recomputes), f"{how}, without a rehearsal"
    room = min(exchange(min(room_for_tensors(card, resolved.world_size) for card in found)))
    candidates = on_rank_0(lambda: planned_candidates(resolved, ranks, lengths, corpus.splits["train"], room))
    chosen = choices.fastest(candidates)
    why = choices.reason(chosen, candidates)
    return chosen, f"{why}, into {room / GIB:.2f} GiB of a GPU, without a rehearsal"


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
        UserError: there is nothing that takes less.
    """
    found = _next(resolved, Limits(choice.clips, choice.frames), lengths, recomputes=choice.recomputes)
    if found is None:
        raise nothing_fits(resolved, choice.too_large)
    limits, recomputes = found
    what = "the next smaller size" if recomputes == choice.recomputes else "activations recomputed"
    return replace(
        choice,
        clips=limits.clips,
        frames=limits.frames,
        reason=f"{what}; {_limits(choice)} ran out of memory ({choice.too_large})",
        is_smallest=_next(resolved, limits, lengths, recomputes=recomputes) is None,
        too_large=None,
        recomputes=recomputes,
    )


def _next(resolved: ResolvedRun, limits: Limits, lengths: Lengths, *, recomputes: bool) -> tuple[Limits, bool] | None:
    """What takes less memory: smaller micro-batches, where those are chosen, and then recomputed activations."""
    smaller = None if resolved.has_given_clips else next_smaller(limits, lengths)
    if smaller is not None:
        return smaller, recomputes
    return (limits, True) if not recomputes and True in resolved.may_recompute else None


def _limits(choice: MicroBatchChoice) -> str:
    return Limits(choice.clips, choice.frames).in_words()


def _rehearsed_on_gpu(stage: Stage, resolved: ResolvedRun, ranks: Ranks, split: Split) -> tuple[Candidate, str]:
    """The micro-batches in which steps are fastest by the plan, or the fastest of those that take less and fit."""
    started, problem = stage.agreed(stage.rehearsal.start())
    room = min(measured.room for measured in started)
    candidates = on_rank_0(lambda: planned_candidates(resolved, ranks, stage.lengths, split, room))
    problems: list[str] = []
    while candidates:
        chosen = choices.fastest(candidates)
        measured, problem = stage.agreed(*stage.step(chosen.limits, recomputes=chosen.recomputes))
        if not problem:
            took = max(one.resident for one in measured) / GIB
            tried = f"; {problems[-1]}" if problems else ""
            if note := on_rank_0(partial(room_for_activations, resolved, stage.lengths, chosen.limits, room)):
                stage.echo(f"note: {note}")
            gib = f"a rehearsal of the heaviest took {took:.2f} of {room / GIB:.2f} GiB of a GPU"
            return chosen, f"{choices.reason(chosen, candidates)}; {gib}{tried}"
        how = " with recomputed activations" if chosen.recomputes else ""
        problems.append(f"{chosen.size} of the longest clips did not fit{how} ({problem})")
        stage.show(problems[-1])
        candidates = [one for one in candidates if one.is_less_than(chosen)]
    if resolved.has_given_clips:  # as without a choice: the run says where it has no memory, and what saves some
        return chosen, f"nothing takes less; {problems[-1]}"
    raise nothing_fits(resolved, problem)
