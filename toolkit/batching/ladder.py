"""A short ladder of lengths to which batches are padded, so that a GPU meets few shapes.

cuDNN plans a convolution or an attention for each new shape, and a compiled or captured graph belongs to one. Clips are
therefore padded to at most 16 lengths and texts to at most 6. The rungs follow from the lengths of a split and the
recipe alone: they are the same on every rank, on any number of ranks and after every resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolkit.batching.lengths import batch_lengths, draws_of_epoch, longest_of_any_epoch, rung_above
from toolkit.batching.order import Indices, micro_batches
from toolkit.recipe.batches import micro_batch_sizes

if TYPE_CHECKING:
    from toolkit.recipe.schema import Recipe

MOST_RUNGS, MOST_TOKEN_RUNGS = 16, 6
# Rungs are multiples of so many encoder positions, to which fast attention kernels align their rows. Where that makes
# padding more than MOST_PADDING, as with clips of a second, they are multiples of fewer.
ALIGNMENTS = (8, 4, 2, 1)
MOST_PADDING = 0.08
MOST_LENGTHS = 1024  # that a ladder is chosen from; with more of them the rungs are multiples of more
# Micro-batches of a step differ by at most one clip. From so many clips on a filler makes them alike: one shape less
# is worth a thirty-second of a pass.
FILL_FROM = 32
# In an epoch of so many steps the last, partial one is filled up to the shapes of the others.
STEPS_TO_FILL = 50


@dataclass(frozen=True)
class Ladder:
    """Ascending rungs.

    Attributes:
        frames: of a clip after augmentation.
        tokens: of a target text, end of sentence included.
    """

    frames: tuple[int, ...]
    tokens: tuple[int, ...]

    def in_words(self) -> str:
        """The ladder in a line."""
        frames, tokens = (", ".join(map(str, rungs)) for rungs in (self.frames, self.tokens))
        return f"batches are padded to {frames} frames and {tokens} tokens"


def training_ladder(frames: NDArray[np.integer], recipe: Recipe, clips: Indices | slice = slice(None)) -> Ladder:
    """The ladder of a run over a split with clips of so many frames; an epoch draws ``clips`` of them, or each once.

    No rung is longer than ``data.max_frames``, unless a clip is, nor than ``training.max_target_tokens``.
    """
    drawn = frames[clips]
    lengths = batch_lengths(drawn, draws_of_epoch(drawn, recipe, 0), recipe)
    longest = longest_of_any_epoch(frames, recipe)
    stride = recipe.model.pose_encoder.frames_per_position
    return Ladder(
        fitted_rungs(lengths, stride, longest=longest, limit=max(longest, recipe.data.max_frames)),
        token_rungs(recipe.training.max_target_tokens),
    )


def token_rungs(limit: int) -> tuple[int, ...]:
    """Rungs for texts of at most ``limit`` tokens, each about 1.4 times the one below: 24, 32, 48, 64, 96, 128.

    They need no tokenizer, which a run has only after its loader has started.
    """
    shares = (limit * 2 ** (-step / 2) for step in range(MOST_TOKEN_RUNGS))
    return tuple(sorted({min(limit, 8 * math.ceil(share / 8)) for share in shares}))


def fitted_rungs(
    lengths: NDArray[np.integer], frames_per_position: int, *, longest: int | None = None, limit: int | None = None
) -> tuple[int, ...]:
    """At most 16 rungs for these lengths: of all ladders of multiples of 8 encoder positions the one that pads least.

    Args:
        lengths: frames of each clip, [clips].
        frames_per_position: of the pose encoder.
        longest: frames that the last rung must hold; None = those of the longest of these clips.
        limit: frames that no rung exceeds; None = ``longest``.
    """
    if not len(lengths):
        return ()
    longest = longest or int(lengths.max())
    lengths = np.clip(lengths, 1, longest)
    rungs: tuple[int, ...] = ()
    for alignment in ALIGNMENTS:
        unit = alignment * frames_per_position
        unit *= max(1, -(-longest // (unit * MOST_LENGTHS)))
        rungs = least_padding(lengths, unit, MOST_RUNGS, longest, limit or longest)
        if 1 - lengths.sum() / np.asarray(rungs)[np.searchsorted(rungs, lengths)].sum() <= MOST_PADDING:
            break
    return rungs


def least_padding(lengths: NDArray[np.integer], unit: int, most: int, longest: int, limit: int) -> tuple[int, ...]:
    """At most ``most`` multiples of ``unit`` that pad these lengths least, by dynamic programming.

    The last one holds ``longest`` frames; where the multiple exceeds ``limit``, it is ``limit`` itself.
    """
    number = -(-longest // unit)
    rungs = np.minimum(np.arange(number + 1) * unit, limit)
    clips = np.cumsum(np.bincount(-(-np.asarray(lengths) // unit), minlength=number + 1))
    # Padded frames of all clips above one rung and up to the next; a rung that is not above the first costs nothing.
    never = np.iinfo(np.int64).max // 2
    step = np.triu((clips - clips[:, None]) * rungs)
    step[np.tril_indices(number + 1, -1)] = never
    cost = np.where(np.arange(number + 1) == 0, 0, never)
    previous = []
    for _ in range(most):
        total = cost[:, None] + step
        # Of equal costs the highest rung below, which may be the rung itself: then the ladder is shorter.
        previous.append(number - total[::-1].argmin(axis=0))
        cost = total.min(axis=0)
    chosen, rung = [], number
    for below in reversed(previous):
        if below[rung] < rung:
            chosen.append(int(rungs[rung]))
            rung = int(below[rung])
    return tuple(reversed(chosen))


def micro_batches_on_rungs(
    global_batch: Indices,
    frames: NDArray[np.integer],
    rungs: Sequence[int],
    rank: int,
    world_size: int,
    micro_batch_size: int,
    micro_batch_frames: int | None,
    full_batch: int,
) -> list[tuple[Indices, int]]:
    """One rank's share of a global batch, each micro-batch with the rung to which it is padded.

    Every rung has its own number of clips: as many as the limits allow at its length. A step is divided evenly, into
    as few micro-batches as the rung of its longest clip needs, so that there are few sizes as well as few lengths, no
    small remainder, and ranks wait little for each other. Fillers complete a micro-batch where that saves a shape.

    Args:
        global_batch: indices of clips.
        frames: of each clip of the split in its batch.
        rungs: of the ladder.
        rank, world_size: of this process.
        micro_batch_size, micro_batch_frames: most clips, and most padded frames, in a micro-batch; a clip that is
            longer is alone.
        full_batch: clips of a step whose shapes a partial batch gets; the number of its own clips to leave it partial.

    Returns:
        arrays of clip indices, fillers negative (``~i``), and frames; on every rank the same number of them.
    """
    clips = global_batch[np.argsort(-frames[global_batch], kind="stable")]
    longest = rung_above(rungs, int(frames[clips[0]]))
    most = micro_batch_size if micro_batch_frames is None else min(micro_batch_size, micro_batch_frames // longest)
    most = max(most, 1)
    size = micro_batch_sizes(full_batch, world_size, most)[1]
    fills = size >= FILL_FROM or len(clips) < full_batch
    shares = []
    for share in micro_batches(clips, rank, world_size, size):
        own = ~share if share[0] < 0 else share
        missing = max(0, size - len(share)) if fills else 0
        filled = np.concatenate([share, np.repeat(~own[-1:], missing)])
        shares.append((filled, rung_above(rungs, int(frames[own[0]]))))
    return shares
