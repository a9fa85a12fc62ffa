"""The plan of an epoch: its clips in their order, divided into the micro-batches of each rank and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from toolkit.batching.epochs import EpochClips, Mixture
from toolkit.batching.ladder import STEPS_TO_FILL, Ladder, micro_batches_on_rungs, training_ladder
from toolkit.batching.lengths import Frames, batch_lengths, draws_of_epoch, sorting_lengths
from toolkit.batching.order import Indices, epoch_order, micro_batches, micro_batches_by_frames
from toolkit.recipe.schema import Recipe

if TYPE_CHECKING:
    from toolkit.recipe.resolve import ResolvedRun


@dataclass(frozen=True)
class PlannedEpoch:
    """The steps of an epoch. Clips are known by their place in it: it may hold a clip several times, and not all.

    Attributes:
        drawn: its clips.
        draws: what augmentation draws for each; None without it.
        lengths: frames by which clips are divided into micro-batches, [places].
        in_batches: frames of each clip in its batch, [places].
        order: places of each step, longest clip first.
        full_batch: clips of a step whose shapes a partial one gets on a ladder; None where each has its own.
        ladder: to which batches are padded; None = to their longest clip.
    """

    drawn: EpochClips
    draws: Frames | None
    lengths: Frames
    in_batches: Frames
    order: list[Indices]
    full_batch: int | None
    ladder: Ladder | None

    @classmethod
    def of(
        cls,
        frames: Frames,
        texts: Frames | None,
        mixture: Mixture,
        recipe: Recipe,
        ladder: Ladder | None,
        epoch: int,
    ) -> PlannedEpoch:
        """Of a split with clips of so many frames, [clips]; ``texts``: sizes of their texts, where these count."""
        training, drawn = recipe.training, mixture.epoch(epoch)
        frames = frames[drawn.clips]
        draws = draws_of_epoch(frames, recipe, epoch)
        # Batches hold clips of similar length after augmentation, so a changed speed adds no padding.
        lengths = sorting_lengths(frames, draws)
        texts = None if texts is None else texts[drawn.clips]
        order = epoch_order(lengths, training.global_batch_size, training.seed, epoch, texts)
        in_batches = batch_lengths(frames, draws, recipe)
        full = training.global_batch_size if len(order) >= STEPS_TO_FILL else None
        return cls(drawn, draws, in_batches if ladder else lengths, in_batches, order, full, ladder)

    def shares(
        self, step: int, rank: int, world_size: int, clip_limit: int, frame_limit: int | None
    ) -> list[tuple[Indices, int]]:
        """A rank's places of each micro-batch of a step, fillers written ``~place``, and its rung; 0 off a ladder."""
        places = self.order[step]
        limits = rank, world_size, clip_limit
        if self.ladder:
            full, rungs = self.full_batch or len(places), self.ladder.frames
            return micro_batches_on_rungs(places, self.lengths, rungs, *limits, frame_limit, full)
        if frame_limit is None:
            shares = micro_batches(places, *limits)
        else:
            shares = micro_batches_by_frames(places, self.lengths, *limits, frame_limit)
        return [(share, 0) for share in shares]

    def shapes(
        self, step: int, rank: int, world_size: int, clip_limit: int, frame_limit: int | None
    ) -> list[tuple[int, int]]:
        """Clips, fillers included, and padded frames of each of a rank's micro-batches of a step."""
        return [
            (len(share), rung or max(1, int(self.in_batches[np.where(share < 0, ~share, share)].max())))
            for share, rung in self.shares(step, rank, world_size, clip_limit, frame_limit)
        ]


def ladder_of(frames: Frames, mixture: Mixture, resolved: ResolvedRun) -> Ladder | None:
    """The ladder of a run over a split with clips of so many frames; None where it pads to the longest clip."""
    if resolved.padding != "ladder":
        return None
    return training_ladder(frames, resolved.recipe, mixture.typical_clips())
