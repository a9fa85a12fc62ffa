"""A split of a mix: the clips of several corpora, one corpus after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.corpus.columns import Column
from toolkit.corpus.packed import Clip, Clips, Part, Split
from toolkit.recipe.prompts import CONDITIONS, fill
from toolkit.recipe.schema import MixPart


@dataclass(frozen=True)
class Share:
    """What a corpus gives to a split of a mix."""

    split: Split
    settings: MixPart

    def known(self, conditions: dict[str, str]) -> dict[str, str]:
        """What is known of a clip, once the recipe has had its say."""
        settings = self.settings
        for name, given in (("language", settings.language), ("target_language", settings.target_language)):
            if given is not None:
                conditions = {**conditions, name: given}
        return conditions if settings.prefix is None else {**conditions, "prompt": fill(settings.prefix, conditions)}

    def read(self, indices: npt.NDArray[np.int64]) -> Clips:
        """The clips at these indices of the corpus, with what the recipe says of them."""
        clips = self.split.read(indices)
        if not self.changes_conditions:
            return clips
        known = [*map(self.known, clips.conditions())]
        return replace(clips, texts=clips.texts | {name: [each[name] for each in known] for name in CONDITIONS})

    @cached_property
    def changes_conditions(self) -> bool:
        given = (self.settings.language, self.settings.target_language, self.settings.prefix)
        return any(value is not None for value in given)


class MixedSplit:
    """Splits of several corpora as one; it offers what ``packed.Split`` does, and is pickled as their paths."""

    def __init__(self, name: str, shares: Sequence[Share]) -> None:
        self.name = name
        self.shares = [share for share in shares if len(share.split)]
        self.ends = list(accumulate(len(share.split) for share in self.shares))

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedSplit, (self.name, self.shares)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The corpora that its clips come from, and what the recipe weighs them by."""
        starts = [0, *self.ends]
        return tuple(
            Part(share.settings.label, range(start, end), _pair(share.settings.weight))
            for share, start, end in zip(self.shares, starts, self.ends, strict=False)
        )

    @cached_property
    def frames(self) -> npt.NDArray[np.int32]:
        """Frames of each clip, int32 [clips]."""
        return np.concatenate([share.split.frames for share in self.shares] or [np.zeros(0, np.int32)])

    @property
    def uids(self) -> Column:
        return Column.joined([share.split.uids for share in self.shares])

    @property
    def texts(self) -> Column:
        return Column.joined([share.split.texts for share in self.shares])

    @property
    def hands_visible(self) -> npt.NDArray[np.float32]:
        """Share of frames that show at least one hand, float32 [clips]."""
        return np.concatenate([share.split.hands_visible for share in self.shares] or [np.zeros(0, np.float32)])

    def values(self, column: str) -> list[str]:
        """What a column says of each clip, or the recipe of its corpus."""
        if column in CONDITIONS:
            return [known[column] for known in self.conditions()]
        return [value for share in self.shares for value in share.split.values(column)]

    def conditions(self) -> Iterator[dict[str, str]]:
        """What a prefix may say about each clip."""
        for share in self.shares:
            yield from map(share.known, share.split.conditions())

    def condition_counts(self) -> Iterator[tuple[dict[str, str], int]]:
        """Each combination of conditions in a corpus, and how many of its clips have it."""
        counted = ((share, *one) for share in self.shares for one in share.split.condition_counts())
        return ((share.known(known), clips) for share, known, clips in counted)

    def clip(self, index: int) -> Clip:
        """The clip at ``index``; its features are a view into the map.

        Raises:
            IndexError: there is no such clip.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)} in split {self.name}")
        place = bisect_right(self.ends, index)
        share = self.shares[place]
        clip = share.split.clip(index - (self.ends[place - 1] if place else 0))
        if not share.changes_conditions:
            return clip
        known: dict[str, Any] = share.known(clip.conditions)
        return replace(clip, **known)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Clips:
        """The clips at these indices, as a batch needs them; their arrays are views into the map."""
        indices = np.asarray(indices)
        places = np.searchsorted(self.ends, indices, side="right")
        rows = {place: np.flatnonzero(places == place) for place in np.unique(places).tolist()}
        starts = [0, *self.ends]
        parts = [self.shares[place].read(indices[there] - starts[place]) for place, there in rows.items()]
        return Clips.joined(parts, np.argsort(np.concatenate([*rows.values()])).tolist())

    def __iter__(self) -> Iterator[Clip]:
        return (self.clip(index) for index in range(len(self)))


def _pair(weight: float | list[float] | None) -> tuple[float, float] | None:
    if weight is None:
        return None
    first, last = weight if isinstance(weight, list) else (weight, weight)
    return first, last
