"""Columns of texts of a packed corpus, read from the memory map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

TextViews = tuple[memoryview, memoryview]
"""Of the texts of a record batch the int32 offsets [clips + 1] and the bytes; both are empty where all texts are.

pyarrow itself takes twice as long for a text as slicing these does.
"""
NO_TEXTS = memoryview(b""), memoryview(b"")


class Column(Sequence[str]):
    """The texts or uids of a split, read from the memory map one by one."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._values[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._values.chunks:
            yield from chunk.to_pylist()

    @classmethod
    def joined(cls, columns: Sequence[Column]) -> Column:
        """Columns one after the other, as one; nothing is copied."""
        return cls(pa.chunked_array([chunk for column in columns for chunk in column._values.chunks], pa.string()))


def text_views(column: pa.StringArray) -> TextViews:
    """Views of a column of a record batch."""
    _, offsets, data = column.buffers()
    ends = memoryview(offsets).cast("i")[column.offset : column.offset + len(column) + 1]
    return (ends, memoryview(data)) if ends[0] != ends[-1] else NO_TEXTS
