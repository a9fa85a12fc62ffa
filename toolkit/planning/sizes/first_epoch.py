"""What the steps of an epoch are padded to in micro-batches of a size.

The order of an epoch is known before it starts, and so are the shapes of all its micro-batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.batching.epochs import mixture_of
from toolkit.batching.lengths import rung_above, text_sizes
from toolkit.batching.planned import PlannedEpoch, ladder_of
from toolkit.corpus.packed import Split
from toolkit.planning.costs.counts import BYTES_A_TOKEN
from toolkit.planning.sizes.shapes import Limits
from toolkit.planning.workload import Passes
from toolkit.recipe.model_cards import tokenizer_of
from toolkit.recipe.resolve import ResolvedRun

MOST_STEPS = 50  # of an epoch that are looked at: with so many the padding is known to about 1 %


class FirstEpoch:
    """Steps of rank 0 in the first epoch, spread over it evenly.

    In each micro-batch of a step rank 0 has the longest clips, and the others wait for it.
    """

    def __init__(self, resolved: ResolvedRun, split: Split) -> None:
        recipe, mixture = resolved.recipe, mixture_of(split, resolved.recipe)
        ladder = ladder_of(split.frames, mixture, resolved)
        self._planned = PlannedEpoch.of(split.frames, text_sizes(split.texts, recipe), mixture, recipe, ladder, 0)
        self._world_size = resolved.data_parallel_size
        steps = len(self._planned.order)
        self._steps = range(0, steps, -(-steps // MOST_STEPS))
        self._passes: dict[Limits, list[list[Passes]]] = {}  # plans of several DeepSpeed JSONs ask for the same
        self._tokens = _tokens(split, resolved)[self._planned.drawn.clips]

    @property
    def clips(self) -> float:
        """Clips of these steps, a rank's share."""
        return sum(len(self._planned.order[step]) for step in self._steps) / self._world_size

    def passes(self, limits: Limits) -> list[list[Passes]]:
        """Clips, fillers included, padded frames and padded tokens of each micro-batch of each of these steps.

        Tokens are estimated: no tokenizer is loaded.
        """
        if limits not in self._passes:
            self._passes[limits] = [self._passes_of(step, limits) for step in self._steps]
        return self._passes[limits]

    def padded_frames(self, limits: Limits) -> NDArray[np.int64]:
        """Padded frames of each micro-batch of these steps, [micro-batches]; fillers count."""
        found = [clips * frames for step in self.passes(limits) for clips, frames, _ in step]
        return np.array(found, dtype=np.int64)

    def _passes_of(self, step: int, limits: Limits) -> list[Passes]:
        planned, tokens = self._planned, self._tokens
        rungs = planned.ladder.tokens if planned.ladder else ()
        of_rank = (step, 0, self._world_size, limits.clips, limits.frames)
        places = [np.where(share < 0, ~share, share) for share, _ in planned.shares(*of_rank)]
        return [
            (clips, frames, rung_above(rungs, int(tokens[own].max())))
            for (clips, frames), own in zip(planned.shapes(*of_rank), places, strict=True)
        ]


def _tokens(split: Split, resolved: ResolvedRun) -> NDArray[np.int64]:
    """Tokens of each target text by its bytes, end of sentence included, [clips]."""
    recipe = resolved.recipe
    bytes_a_token = 1 if tokenizer_of(recipe.model) == "bytes" else BYTES_A_TOKEN
    sizes = np.fromiter((len(text.encode()) for text in split.texts), dtype=np.int64)
    return np.minimum(1 + -(-sizes // bytes_a_token), recipe.training.max_target_tokens)
