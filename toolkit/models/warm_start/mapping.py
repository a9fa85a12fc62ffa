"""One tensor out of another: which of its rows and columns come from which of the source's.

Where the source has nothing for a place, a token's row starts as the mean of the source's rows (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models"), and what reads a new landmark starts small.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Of a drawn weight by which an old unit reads a new landmark. As many new landmarks as shared ones then change the
# variance of what the unit gets by a hundredth, so that it does what it has learnt; and no weight starts at zero,
# behind which, in a graph, the new landmark's own weights would have no gradient.
NEW_SCALE = 0.1


@dataclass(frozen=True)
class Axis:
    """Where the places of one dimension come from."""

    places: Tensor  # int64 [places]: the index in the source's tensor, -1 where the source has none
    size: int  # of the source's dimension

    @property
    def is_same(self) -> bool:
        """Whether all places are the source's, in its order."""
        return len(self.places) == self.size and bool((self.places == torch.arange(self.size)).all())

    @property
    def shared(self) -> int:
        """Places that come from the source."""
        return int((self.places >= 0).sum())


def by_name(wanted: Sequence[Hashable], known: Sequence[Hashable]) -> Axis:
    """The axis of places with names, out of a source's with names of the same kind."""
    index = {name: place for place, name in enumerate(known)}
    return Axis(torch.tensor([index.get(name, -1) for name in wanted], dtype=torch.int64), len(known))


@dataclass(frozen=True)
class Mapping:
    """How a tensor of the run comes from one of the source."""

    source: str  # name of the source's tensor
    rows: Axis | None = None  # None = the same rows
    columns: Axis | None = None  # None = the same columns
    new: Literal["mean", "drawn"] = "drawn"  # what a new row starts as
    tokens: int | None = None  # the source's rows that a mean is of; None = all

    @property
    def is_same(self) -> bool:
        """Whether the tensor is the source's as it is."""
        return all(axis is None or axis.is_same for axis in (self.rows, self.columns))

    def apply(self, values: Tensor, drawn: Tensor) -> Tensor:
        """The run's tensor, from the source's values and those that were drawn for the run.

        ``drawn`` is read in the places that are new and not a mean; its type is the result's.
        """
        if self.is_same:
            return values
        if self.new == "mean":
            return _rows_by_token(values, self.rows or self.columns, 0 if self.rows else 1, self.tokens)
        rows, columns = (
            axis or Axis(torch.arange(size), size)
            for axis, size in zip((self.rows, self.columns), drawn.shape, strict=True)
        )
        old_rows, old_columns, new_columns = rows.places >= 0, columns.places >= 0, columns.places < 0
        result = drawn.clone()
        result[old_rows.unsqueeze(1) & new_columns] *= NEW_SCALE
        shared = values[rows.places[old_rows]][:, columns.places[old_columns]]
        result[old_rows.unsqueeze(1) & old_columns] = shared.flatten().to(result.dtype)
        return result


def _rows_by_token(values: Tensor, axis: Axis | None, dim: int, tokens: int | None) -> Tensor:
    assert axis is not None
    values = values.movedim(dim, 0)
    mean = values[:tokens].mean(dim=0, dtype=torch.float32).to(values.dtype)
    result = mean.expand(len(axis.places), *values.shape[1:]).clone()
    is_old = axis.places >= 0
    result[is_old] = values[axis.places[is_old]]
    return result.movedim(0, dim)
