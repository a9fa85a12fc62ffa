"""How the clips of an optimizer step are shared out over ranks and forward passes.

``training.micro_batch_size`` is an upper limit, so any number of ranks up to the number of clips can share them. Ranks'
shares differ by at most one clip, and so do micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # launch/translate.py counts memory with this file and waits for no reader of recipes
    from toolkit.recipe.schema import Evaluation, Training

# Padded frames of a generation batch that are chosen: larger batches are hardly faster, and wait for their last clip.
MOST_BATCH_FRAMES = 8192

# Gradients that are copied by one call as they are joined: while they are copied they are in memory twice.
NUMBERS_AT_ONCE = 2**22

LARGEST_WHOLE_GRADIENT = 2**27
"""Bytes of gradient that a rank may hold to reduce once a step, though ZeRO partitions it.

An adapter of rank 16 on T5-3B and the pose encoder have 12 M weights, 45 MiB; one of rank 64 still fits. All of a
T5-Base has 1 GiB, which stages 2 and 3 are chosen to avoid.
"""


@dataclass(frozen=True)
class MicroBatchChoice:
    """What ``training.micro_batch_size: auto`` became on the hardware that is there.

    Attributes:
        clips: of a forward pass of one rank, at most.
        frames: padded frames of one, at most; None = no limit.
        reason: why, in words.
        hardware: where it was chosen, in words; on other hardware it is chosen again.
        settings: a hash of what else it depends on: model, batch, DeepSpeed JSON, corpus.
        batch_frames: what ``evaluation.batch_frames: auto`` became; None where the recipe gives a number.
        is_smallest: whether there are no smaller ones.
        too_large: why a run with it ran out of memory; the next start takes smaller ones. None = it has not.
        recomputes: whether activations are recomputed, which counts with ``training.gradient_checkpointing: auto``.
    """

    clips: int
    frames: int | None
    reason: str
    hardware: str
    settings: str
    batch_frames: int | None = None
    is_smallest: bool = False
    too_large: str | None = None
    recomputes: bool = False

    def in_words(self) -> str:
        """What was chosen and why, in a line."""
        frames = f" and {self.frames} padded frames" if self.frames else ""
        evaluation = f"; generation batches of at most {self.batch_frames} padded frames" if self.batch_frames else ""
        recomputed = ", activations recomputed" if self.recomputes else ""
        return f"micro-batches of at most {self.clips} clips{frames}{recomputed}: {self.reason}{evaluation}"


def clip_limit(training: Training) -> int:
    """Most clips of a forward pass; of ``auto``, before it is chosen, all clips of a step."""
    return training.global_batch_size if training.micro_batch_size == "auto" else training.micro_batch_size


def most_batch_frames(evaluation: Evaluation) -> int:
    """Padded frames of a generation batch; of ``auto``, before it is chosen, the most that it may become."""
    return MOST_BATCH_FRAMES if evaluation.batch_frames == "auto" else evaluation.batch_frames


def total_steps(training: Training, epoch_steps: int) -> int:
    """Optimizer steps of a whole run; ``epoch_steps`` are those of an epoch."""
    steps = math.ceil(training.epochs * epoch_steps)
    return min(steps, training.max_steps) if training.max_steps else steps


def num_micro_batches(clips: int, world_size: int, limit: int) -> int:
    """Forward passes of each rank for the clips of one optimizer step, each of at most ``limit`` clips."""
    largest_share = -(-clips // world_size)
    return -(-largest_share // limit)


def micro_batch_sizes(clips: int, world_size: int, limit: int) -> tuple[int, int]:
    """Clips in the smallest and in the largest micro-batch of all ranks; arguments as for ``num_micro_batches``."""
    seats = world_size * num_micro_batches(clips, world_size, limit)
    return clips // seats, -(-clips // seats)


def batch_in_words(clips: int, world_size: int, limit: int, frames: int | None, group: int = 1) -> str:
    """The arithmetic of a step in words: ``128 clips = 8 ranks x 1 micro-batch of 16``.

    ``frames`` are the most padded frames in a micro-batch; None = no limit. Of ``world_size`` groups each has so many
    ranks, which take the same clips.
    """
    ranks = _counted(world_size, "rank") if group == 1 else f"{_counted(world_size, 'group')} of {group} ranks"
    if frames is not None:
        return f"{clips} clips over {ranks}, in micro-batches of at most {limit} clips and {frames} frames"
    smallest, largest = micro_batch_sizes(clips, world_size, limit)
    sizes = f"{largest}" if smallest == largest else f"{smallest} or {largest}"
    return (
        f"{clips} clips = {ranks} x {_counted(num_micro_batches(clips, world_size, limit), 'micro-batch')} of {sizes}"
    )


def step_in_words(training: Training, world_size: int, group: int = 1) -> str:
    """The arithmetic of a step in words, before ``auto`` has become a number; ``group`` as of ``batch_in_words``."""
    if training.micro_batch_size == "auto":
        clips = f"{training.global_batch_size} clips over {_counted(world_size, 'rank')}"
        return f"{clips}, in micro-batches that are chosen at the start (training.micro_batch_size=auto)"
    limit, frames = training.micro_batch_size, training.micro_batch_frames
    return batch_in_words(training.global_batch_size, world_size, limit, frames, group)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"
