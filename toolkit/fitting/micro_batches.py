"""``training.micro_batch_size: auto``: the micro-batches of a run, chosen on the hardware that is there.

On GPUs larger ones are faster: the largest that fits by the plan is rehearsed, then smaller ones until one fits. On
CPUs caches decide: the fastest of those that fit is taken. All ranks compare what they found after each rehearsal, and
so make the same choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from toolkit.cluster.cores import share_of_cores, usable_cores
from toolkit.cluster.ops import build_missing_ops, needed_ops
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange, on_each_node, on_rank_0
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.fitting.hardware import GIB, Card, cards, describe
from toolkit.fitting.kept_choices import earlier_choice, settings_hash
from toolkit.fitting.memory_limits import MemoryLimit, memory_limit
from toolkit.fitting.planned_size import planned_size
from toolkit.fitting.rehearsal import Measured, Rehearsal, room_for_tensors
from toolkit.fitting.shapes import (
    Lengths,
    Limits,
    Shape,
    generation_batches,
    heaviest,
    lengths_of,
    limits_of,
    next_smaller,
    sizes,
    typical,
)
from toolkit.models.build import fetch_backbone
from toolkit.recipe.batches import MicroBatchChoice, most_batch_frames
from toolkit.recipe.choices import choices_folder, keep_choice
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.engine import import_libraries

# Of the best speed: a smaller micro-batch that reaches it needs less memory.
AS_FAST = 0.97
# Each size is timed so often, and its shortest time counts: the first pass of a size gets its memory from the system,
# and other processes make a pass longer, never shorter.
TIMES = 2
SHOWN_EVERY = 5.0  # seconds between lines about a rehearsal
FEW = 8  # clips of a micro-batch without a rehearsal, on CPUs, and where a rehearsal begins to look for the fastest

Echo = Callable[[str], None]


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
    stage = _Stage.of(resolved, ranks, corpus, lengths, echo, has_gpu=has_gpu)
    try:
        size, reason = _largest(stage, resolved) if has_gpu else _fastest(stage, resolved)
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


def _batch_frames(stage: _Stage, resolved: ResolvedRun, corpus: Corpus) -> int | None:
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
        raise _nothing_fits(resolved, choice.too_large)
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


@dataclass
class _Stage:
    """What a rank needs to rehearse.

    Attributes:
        rehearsal: its process.
        lengths: of the clips.
        limit: what it may take on CPUs.
        has_gpu: whether it computes on one.
        echo: prints a line on rank 0.
        shown: when the last line was printed, by the monotonic clock.
    """

    rehearsal: Rehearsal
    lengths: Lengths
    limit: MemoryLimit
    has_gpu: bool
    echo: Echo
    shown: float

    @classmethod
    def of(
        cls, resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, echo: Echo, *, has_gpu: bool
    ) -> _Stage:
        own = usable_cores()
        threads = share_of_cores(own, exchange(own))
        limit = memory_limit(ranks.local_world_size)
        exchange(None)  # no rank takes memory before all have looked
        rehearsal = Rehearsal(resolved, ranks, corpus, lengths, threads, has_gpu=has_gpu)
        return cls(rehearsal, lengths, limit, has_gpu, echo, time.monotonic())

    def show(self, text: str) -> None:
        """Print what was found, where nothing was printed for some seconds."""
        if time.monotonic() - self.shown >= SHOWN_EVERY:
            self.shown = time.monotonic()
            self.echo(f"  rehearsal: {text}")

    def step(self, size: int) -> tuple[Measured, str | None]:
        """One step over the heaviest micro-batches of a size, and why it does not fit; None where it does."""
        return self._held_to_limit(self.rehearsal.step(heaviest(limits_of(size, self.lengths), self.lengths)))

    def translation(self, shapes: Sequence[Shape]) -> tuple[Measured, str | None]:
        """The search over the heaviest of some generation batches, and why it does not fit."""
        return self._held_to_limit(self.rehearsal.translation(shapes))

    def _held_to_limit(self, measured: Measured) -> tuple[Measured, str | None]:
        if measured.problem or self.has_gpu:
            return measured, measured.problem
        return measured, _over(measured, self.limit)

    def agreed(self, own: Measured, problem: str | None = None) -> tuple[list[Measured], str | None]:
        """What all ranks measured, and the problem that any of them had.

        Raises:
            UserError: a rank met an error that is not about memory.
        """
        everybody = exchange((own, problem))
        for rank, (measured, _) in enumerate(everybody):
            if measured.error:
                kind, arguments = measured.error
                if issubclass(kind, UserError):
                    raise kind(*arguments)
                raise UserError(
                    f"training.micro_batch_size=auto: the rehearsal of rank {rank} failed: {arguments[0]}",
                    "give a number instead: training.micro_batch_size=8",
                )
        problems = [(rank, problem) for rank, (_, problem) in enumerate(everybody) if problem]
        first = f"rank {problems[0][0]}: {problems[0][1]}" if problems else None
        return [measured for measured, _ in everybody], first


def _over(measured: Measured, limit: MemoryLimit) -> str | None:
    if measured.resident > limit.resident:
        return f"{measured.resident / GIB:.2f} GiB of memory, and {limit.resident / GIB:.2f} are there for it"
    if limit.address_space is not None and measured.address_space > limit.address_space:
        return (
            f"{measured.address_space / GIB:.2f} GiB of addresses, and ulimit -v leaves {limit.address_space / GIB:.2f}"
        )
    return None


def _largest(stage: _Stage, resolved: ResolvedRun) -> tuple[int, str]:
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
            return size, f"a rehearsal of the heaviest took {took:.2f} of {room / GIB:.2f} GiB of a GPU{tried}"
        problems.append(f"{size} of the longest clips did not fit ({problem})")
        stage.show(problems[-1])
    raise _nothing_fits(resolved, problem)


def _fastest(stage: _Stage, resolved: ResolvedRun) -> tuple[int, str]:
    """On CPUs: the fastest size of those that fit, by the clips of typical length that a pass computes in a second."""
    candidates = sorted(sizes(stage.lengths.share))
    largest = _largest_by_growth(stage, resolved, candidates)
    speeds = _speeds(stage, _doubling([size for size in candidates if size <= largest]))
    fastest = smallest_as_fast(speeds) if speeds else candidates[0]
    fits_all = largest == candidates[-1]
    for size in reversed([size for size in candidates if size <= fastest]):
        measured, problem = stage.agreed(*stage.step(size))
        if not problem:
            took = max(one.resident for one in measured) / GIB
            tried = ", ".join(f"{speed:.3g} with {number}" for number, speed in speeds.items())
            most = "" if fits_all else f"; more than {max(size, largest)} of the longest clips do not fit"
            return size, (
                f"as many frames as {_words(size)} are computed fastest (clips/s of a rank in a rehearsal: {tried}); "
                f"the heaviest took {took:.2f} of {stage.limit.resident / GIB:.2f} GiB of a rank{most}"
            )
        largest, fits_all = min(largest, size - 1), False
        stage.rehearsal.close()  # the largest memory of a process never shrinks
    raise _nothing_fits(resolved, problem)


def _speeds(stage: _Stage, tried: list[int]) -> dict[int, float]:
    """Clips of typical length a second of a rank, by size: from a few clips on upwards while larger sizes are faster.

    Where the first of them is not faster, downwards while smaller ones are about as fast.
    """
    speeds: dict[int, float] = {}

    def is_worth_more(size: int, factor: float) -> bool:
        """Time a size; whether ``factor`` of its speed reaches the best before it."""
        shape = typical(limits_of(size, stage.lengths), stage.lengths)
        own = _shortest([stage.rehearsal.passes(shape) for _ in range(TIMES)])
        measured, problem = stage.agreed(own, own.problem)
        if problem:
            return False
        best, speed = max(speeds.values(), default=0.0), shape.clips / max(one.seconds for one in measured)
        speeds[size] = speed
        stage.show(f"{speed:.3g} clips/s of a rank with as many frames as {_words(size)}")
        return factor * speed > best

    start = max((number for number, size in enumerate(tried) if size <= FEW), default=0)
    is_worth_more(tried[start], 1.0)
    faster = 0
    for size in tried[start + 1 :]:
        if not is_worth_more(size, AS_FAST):
            break
        faster += 1
    for size in [] if faster else reversed(tried[:start]):
        if not is_worth_more(size, 1 / AS_FAST):
            break
    return speeds


def _largest_by_growth(stage: _Stage, resolved: ResolvedRun, candidates: list[int]) -> int:
    """The largest size whose memory, by that of the two smallest, is within the limit.

    A size that is far too large is never tried on CPUs: the kernel might end another process.
    """
    first, own_problem = stage.step(candidates[0])
    if problem := stage.agreed(first, own_problem)[1]:
        raise _nothing_fits(resolved, problem)
    if len(candidates) == 1:
        return candidates[0]
    second, own_problem = stage.step(candidates[1])
    if stage.agreed(second, own_problem)[1]:
        stage.rehearsal.close()
        return candidates[0]
    most = candidates[1] + min(
        room * (candidates[1] - candidates[0]) / growth if growth > 0 else candidates[-1]
        for growth, room in (
            (second.resident - first.resident, stage.limit.resident - second.resident),
            (second.address_space - first.address_space, (stage.limit.address_space or 2**63) - second.address_space),
        )
    )
    return max(size for size in candidates if size <= max(candidates[0], min(exchange(most))))


def _shortest(passes: Sequence[Measured]) -> Measured:
    """The pass that took the least time, or the first that failed."""
    failed = [one for one in passes if one.problem or one.error]
    return failed[0] if failed else min(passes, key=lambda one: one.seconds)


def smallest_as_fast(speeds: dict[int, float]) -> int:
    """The smallest size that is about as fast as the fastest: it needs less memory."""
    return min(size for size, speed in speeds.items() if speed >= AS_FAST * max(speeds.values()))


def _doubling(candidates: Sequence[int]) -> list[int]:
    """Of ascending sizes those that are at least twice the one before, and the last."""
    chosen: list[int] = []
    for size in candidates:
        if not chosen or size >= 2 * chosen[-1]:
            chosen.append(size)
    return chosen if chosen[-1] == candidates[-1] else [*chosen, candidates[-1]]


def _words(size: int) -> str:
    return "one of the longest clips has" if size == 1 else f"{size} of the longest clips have"


def _nothing_fits(resolved: ResolvedRun, problem: str | None) -> UserError:
    return UserError(
        f"training.micro_batch_size=auto: not one of the longest clips fits: {problem}",
        "set training.gradient_checkpointing=true or a lower data.max_frames, or give another --ds; python "
        f"launch/plan.py --recipe {resolved.recipe.name} says what each saves",
    )
