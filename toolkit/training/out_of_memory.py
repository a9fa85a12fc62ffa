"""A run that ran out of memory, or whose rank the kernel killed for it: what and where, and which settings need less.

Where a forward pass failed and no other rank notices, the step was taken again in halves instead (``halving.py``). Else
gradients may have been summed over ranks or kept by DeepSpeed, and a rank that fails alone leaves the others in a
collective: the run resumes from its last checkpoint, with ``training.micro_batch_size=auto`` in smaller micro-batches.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import psutil
import torch

from toolkit.checkpointing.checkpoints import Progress, complete_checkpoints
from toolkit.checkpointing.run_directory import CHECKPOINTS, details_of
from toolkit.cluster.failures import ADVICE_SECONDS, Explainer, Failure
from toolkit.cluster.memory_shortage import (
    LOADER_KILLED,
    boot_id,
    in_short,
    is_out_of_memory,
    oom_kills,
    oom_kills_by_place,
)
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import EXIT_OUT_OF_MEMORY, EXIT_SMALLER_NEXT, UserError, first_line
from toolkit.planning.afterwards import Computed, advice_within
from toolkit.planning.comparison import Advice
from toolkit.planning.hardware import GIB, Hardware
from toolkit.recipe.choices import mark_too_large
from toolkit.recipe.resolve import ResolvedRun, read_choice
from toolkit.training.monitoring.device_errors import is_of_device
from toolkit.training.monitoring.memory_phases import MemoryPhases, Shape, heaviest

log = logging.getLogger("toolkit")

MOST_ADVICE = 4  # settings that a line has room for
# Settings of another model: a run cannot resume with them.
OF_THE_MODEL = "model."


def kernels_counts() -> dict[str, object]:
    """What a run that begins notes in its status, for :func:`mark_if_killed`."""
    return {"boot": boot_id(), "oom_kills": oom_kills_by_place()}


def mark_if_killed(run_dir: Path) -> None:
    """Let this start take smaller micro-batches where all ranks of the last one were killed for want of memory.

    Nobody was left to report it: the run has no end, and since it began the kernel has killed a process of this
    machine. On another machine, or after a boot, that is not known.
    """
    began, choice = details_of(run_dir, "running"), read_choice(run_dir)
    if choice is None or choice.is_smallest or choice.too_large or not began.get("boot"):
        return
    then, now = began.get("oom_kills", {}), oom_kills_by_place()
    if began["boot"] == boot_id() and any(count > then.get(place, count) for place, count in now.items()):
        what = "its ranks ended without an error, and the kernel has killed a process because memory was short"
        with contextlib.suppress(OSError, UserError):
            mark_too_large(run_dir, choice, what)


@dataclass
class RunFailures(Explainer):
    """Explains failures of a run for which memory was short, or whose GPU has failed.

    Attributes:
        resolved, ranks, corpus: the run.
        memory: where this rank stands.
        progress: of the run.
        kills: of the kernel on this machine before the run.
    """

    resolved: ResolvedRun
    ranks: Ranks
    corpus: Corpus
    memory: MemoryPhases
    progress: Progress
    kills: int = field(default_factory=oom_kills)

    def explain(self, failure: Failure, error: BaseException | None) -> Failure:
        """Say what and where, and let the next start take smaller micro-batches where that helps."""
        if error is not None and is_of_device(error):
            reason = f"{failure.who} lost its GPU {self._where(is_own=True)}: {first_line(error)}"
            hint = f"{self._next_start('', '')}; where nvidia-smi reports errors of this GPU, start on others"
            return replace(failure, reason=reason, lines=f"error: {reason}\nhint: {hint}")
        what = self._what(failure, error)
        if what is None:
            return failure
        where = self._where(is_own=error is not None)
        said = f": {in_short(error)}" if error is not None else ""
        is_smaller = self._mark(f"{failure.who} in step {self.progress.step + 1}")
        reason = f"{failure.who} {what} {where}{said}"
        less = "recomputed activations" if self.resolved.has_given_clips else "smaller micro-batches"
        how = ("", f" with {less}") if is_smaller else ("with settings that need less memory ", "")
        return replace(
            failure,
            reason=reason,
            lines=f"error: {reason}\nhint: {self._next_start(*how)}",
            code=EXIT_SMALLER_NEXT if is_smaller else EXIT_OUT_OF_MEMORY,
            is_explained=True,
        )

    def advise(self, failure: Failure) -> str:
        """The settings that save most in the phase that failed; nothing for other failures."""
        if not failure.is_explained:
            return ""
        advice = advice_within(
            ADVICE_SECONDS,
            self.resolved,
            self.corpus,
            hardware_of(self.ranks),
            computed(self.memory.first, self.memory.later) or _heaviest(self.resolved),
            self.memory.phase,
        )
        line = advice_in_words(advice, has_gpu=torch.cuda.is_available())
        if not line:
            return ""
        log.error(line)
        return f"{line}\n"

    def _what(self, failure: Failure, error: BaseException | None) -> str | None:
        """What happened for want of memory; None where something else did."""
        if error is not None and is_out_of_memory(error):
            return "ran out of memory"
        was_killed = error is None and failure.has_died
        lost_loader = error is not None and LOADER_KILLED in str(error)
        if not (was_killed or lost_loader) or oom_kills() <= self.kills:
            return None
        whom = "was" if was_killed else "lost a loader process, which was"
        return f"{whom} killed by the kernel because memory was short,"

    def _where(self, *, is_own: bool) -> str:
        after = f"after step {self.progress.step}"
        if self.memory.phase == "start":
            return "at the start"
        if self.memory.phase == "evaluation":
            return f"in the evaluation {after}"
        if self.memory.phase == "save":
            return f"while it saved {after}"
        # Another rank's micro-batch is not known here.
        batch = f"a micro-batch of {self.memory.batch}" if is_own and self.memory.batch else self.resolved.batch
        return f"in step {self.progress.step + 1}, with {batch}"

    def _mark(self, why: str) -> bool:
        """Let the next start take smaller micro-batches; whether it will."""
        choice = self.resolved.choice
        if choice is None or choice.is_smallest or self.memory.phase != "step":
            return False
        try:
            mark_too_large(self.resolved.run_dir, choice, why)
        except (OSError, UserError):
            return False
        return True

    def _next_start(self, changed: str, how: str) -> str:
        """What was saved, and what the same command does: ``changed`` before, ``how`` then."""
        newest = complete_checkpoints(self.resolved.run_dir / CHECKPOINTS)[-1:]
        begins = "resumes from it" if newest else "starts again"
        saved = f"the last checkpoint, {newest[0].name}, is intact" if newest else "nothing was saved yet"
        return f"{saved}; {changed}the same command {begins}{how}"


def advice_in_words(advice: Sequence[Advice], *, has_gpu: bool) -> str:
    """A line for the terminal; empty without advice."""
    if not advice:
        return ""

    def listed(chosen: Sequence[Advice]) -> str:
        return ", ".join(f"{one.settings} ({one.gain / GIB:.2f} GiB less)" for one in chosen[:MOST_ADVICE])

    resumes = [one for one in advice if OF_THE_MODEL not in one.settings]
    parts = []
    if resumes:
        parts.append(f"with which the run resumes: {listed(resumes)}")
    if others := [one for one in advice if OF_THE_MODEL in one.settings]:
        parts.append(f"for another run (--new): {listed(others)}")
    plan = "the plan of a rank" if has_gpu else "the plan of a rank on a GPU"
    return f"hint: settings that need less memory, by {plan}, {'; '.join(parts)}"


def hardware_of(ranks: Ranks) -> Hardware:
    """What a plan of this run is for; without a GPU the memory of the machine stands for that of one."""
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    return Hardware(ranks.world_size, memory, nodes if ranks.world_size % nodes == 0 else 1)


def computed(first: Iterable[Shape], later: Iterable[Shape]) -> Computed | None:
    """The heaviest micro-batches of all ranks, for a plan; None before the first one."""
    begins, others = heaviest(first), heaviest(later)
    if not begins:
        return None
    most = begins[-1]  # padded frames
    return Computed(
        most.clips,
        most.frames,
        max(shape.tokens for shape in (*begins, *others)),
        later=others[-1].padded[0] if others else 0,
        first_shapes=tuple(map(astuple, begins)),
        later_shapes=tuple(map(astuple, others)),
    )


def _heaviest(resolved: ResolvedRun) -> Computed:
    """What a run may compute, before it has."""
    data, training = resolved.recipe.data, resolved.recipe.training
    clips = resolved.micro_batch_size
    if resolved.frame_limit:
        clips = max(1, min(clips, resolved.frame_limit // data.max_frames))
    return Computed(clips, data.max_frames, training.max_target_tokens)
