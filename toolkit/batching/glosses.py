"""Glosses as targets of the CTC head: their vocabulary, and the ids of a batch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def gloss_vocabulary(glosses: Iterable[str]) -> list[str]:
    """The different glosses of clips, whose glosses are separated by spaces, in the order of their characters."""
    return sorted({gloss for of_clip in glosses for gloss in of_clip.split()})


def gloss_ids(glosses: Sequence[str], vocabulary: Mapping[str, int], is_filler: Tensor, padding: int) -> Tensor:
    """The places of the glosses of clips in the vocabulary: int64 [clips, glosses], padded; a filler has none.

    Raises:
        KeyError: a gloss is not in the vocabulary, which is that of these clips.
    """
    fillers = is_filler.tolist()
    rows = [
        [] if filler else [vocabulary[gloss] for gloss in of_clip.split()]
        for of_clip, filler in zip(glosses, fillers, strict=True)
    ]
    ids = np.full((len(rows), max(1, *map(len, rows))), padding, np.int64)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
    return torch.from_numpy(ids)
