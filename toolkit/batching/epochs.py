"""Which clips each epoch draws from the corpora of a training split, and how often each was drawn before.

One corpus gives each of its clips once an epoch. Several are drawn by weight or size, and so may be one where an epoch
has another number of clips (``data.epoch_clips``): each gives its clips without replacement, pass after pass, every
pass in an order of its own. What an epoch draws follows from the seed, the epoch and the recipe alone.

The random stream of a pass is (seed, pass, 4, corpus); ``lengths.py`` lists the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from toolkit.batching.order import Indices, steps_per_epoch
from toolkit.recipe.batches import total_steps

if TYPE_CHECKING:
    from toolkit.corpus.packed import Part, Split
    from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class EpochClips:
    """The clips of an epoch, corpus after corpus and pass after pass.

    Attributes:
        clips: their indices in the split, [draws]; a small corpus may give a clip several times.
        passes: how often the clip's corpus was gone through before, [draws].
    """

    clips: Indices
    passes: Indices


@dataclass(frozen=True)
class Mixture:
    """What the epochs of a run draw from.

    Attributes:
        parts: the corpora.
        epoch_clips: clips of an epoch.
        temperature: of the sizes, for corpora without weights.
        epochs: of the run, over which weights change.
        seed: of the run.
    """

    parts: tuple[Part, ...]
    epoch_clips: int
    temperature: float
    epochs: int
    seed: int

    def shares(self, epoch: int) -> list[float]:
        """The share of each corpus in the clips of an epoch; a weight that changes has its mean over the epoch."""
        time = min(1.0, (epoch + 0.5) / self.epochs)
        weights = [
            len(part.clips) ** (1.0 / self.temperature)
            if part.weights is None
            else part.weights[0] + (part.weights[1] - part.weights[0]) * time
            for part in self.parts
        ]
        return [weight / sum(weights) for weight in weights]

    def drawn_before(self, epoch: int) -> list[int]:
        """How many clips of each corpus the epochs before this one draw."""
        drawn = _drawn(self)
        while len(drawn) <= epoch:
            drawn.append(_one_more(drawn[-1], len(drawn), self))
        return [count for count, _ in drawn[epoch]]

    def epoch(self, epoch: int) -> EpochClips:
        """The clips that an epoch draws."""
        clips: list[Indices] = []
        passes: list[Indices] = []
        limits = zip(self.drawn_before(epoch), self.drawn_before(epoch + 1), strict=True)
        for number, (part, (start, end)) in enumerate(zip(self.parts, limits, strict=True)):
            size = len(part.clips)
            for one in range(start // size, -(-end // size)):
                first, last = max(0, start - one * size), min(size, end - one * size)
                own = np.arange(size)
                if last - first < size:
                    order = np.random.default_rng((self.seed, one, 4, number)).permutation(size)
                    own = np.sort(order[first:last])
                clips.append(part.clips.start + own)
                passes.append(np.full(len(own), one))
        return EpochClips(np.concatenate(clips), np.concatenate(passes))

    def typical_clips(self) -> Indices:
        """Those of the first epoch, and where weights change of the last one, too."""
        first = self.epoch(0).clips
        changes = any(part.weights and part.weights[0] != part.weights[1] for part in self.parts)
        return np.concatenate([first, self.epoch(self.epochs - 1).clips]) if changes else first

    def lines(self) -> list[str]:
        """What the first and the last epoch draw of each corpus, a line a corpus; empty for a single one."""
        if len(self.parts) == 1:
            return []
        shares = zip(self.shares(0), self.shares(self.epochs - 1), strict=True)
        return [
            f"{part.corpus}: {len(part.clips):,} clips, {first:.1%} of an epoch "
            f"({first * self.epoch_clips / len(part.clips):.3g} passes)"
            + (f", {last:.1%} at the end" if abs(first - last) > 0.0005 else "")
            for part, (first, last) in zip(self.parts, shares, strict=True)
        ]


def mixture_of(split: Split, recipe: Recipe) -> Mixture:
    """What the epochs of a run draw from its training split."""
    clips, training = recipe.data.epoch_clips or len(split), recipe.training
    steps = steps_per_epoch(clips, training.global_batch_size)
    epochs = math.ceil(total_steps(training, steps) / steps)
    return Mixture(split.parts, clips, recipe.data.temperature, epochs, training.seed)


def epoch_steps(split: Split, recipe: Recipe) -> int:
    """Optimizer steps of an epoch of a run over this training split."""
    return steps_per_epoch(recipe.data.epoch_clips or len(split), recipe.training.global_batch_size)


@lru_cache(maxsize=8)
def _drawn(mixture: Mixture) -> list[list[tuple[int, float]]]:
    """For each epoch so far, of each corpus the clips drawn before it and those that were due; it grows as it is used.

    Epochs are added up, so that rounding never moves a corpus more than a clip away from its share.
    """
    return [[(0, 0.0)] * len(mixture.parts)]


def _one_more(before: list[tuple[int, float]], epoch: int, mixture: Mixture) -> list[tuple[int, float]]:
    """Clips drawn and due of each corpus after epoch ``epoch - 1``: whole numbers by largest remainder."""
    due = [
        earlier + share * mixture.epoch_clips
        for (_, earlier), share in zip(before, mixture.shares(epoch - 1), strict=True)
    ]
    # Rounded, so that a remainder is the same on every machine.
    wanted = [round(total - count, 6) for (count, _), total in zip(before, due, strict=True)]
    counts = [max(0, math.floor(number)) for number in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda part: (counts[part] - wanted[part], part))
    for part in by_remainder[: max(0, mixture.epoch_clips - sum(counts))]:
        counts[part] += 1
    for part in reversed(by_remainder):  # where a corpus was ahead of its share, others wait
        counts[part] -= min(counts[part], max(0, sum(counts) - mixture.epoch_clips), 1)
    return [(count + new, total) for (count, _), new, total in zip(before, counts, due, strict=True)]
