"""The packed corpus as training reads it: a memory map of every split.

On disk a corpus is a folder that the ``datasets`` library opens with ``load_from_disk``::

    corpus.json          how the features were made: landmarks, frame rate, normalisation, checksums, counts
    rejects.csv          the clips that could not be used, each with its reason
    dataset_dict.json    the names of the splits
    train/               data-00000-of-00004.arrow ..., dataset_info.json, state.json
    dev/ test/ ...

Features are float16, a list of frames of ``points x channels`` values each, NaN where a landmark is missing. What
another network made of the video is a second column, ``video_features``, with the same frames. A corpus has at least
one of the two. Reading needs pyarrow alone, which starts a hundred times faster than ``datasets`` and gives views into
the map. ``writer.py`` writes these files.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from toolkit.errors import UserError
from toolkit.poses.landmarks import LandmarkSet
from toolkit.recipe.prompts import CONDITIONS

FORMAT_VERSION = 1
METADATA_FILE = "corpus.json"
MOST_CHUNKS = 1024  # whose views a process keeps; 30 KiB each
# Settings of preparation that a corpus keeps in its metadata.
KEPT_SETTINGS = ("fps", "max_frames", "min_frames", "too_long", "no_hands", "shared_texts")
TEXT_COLUMNS = ("uid", "text", "video", *CONDITIONS, "signer", "gloss")
LATER_COLUMNS = ("target_language", "prompt", "context", "signer", "gloss")  # which corpora of earlier versions lack


@dataclass(frozen=True)
class Clip:
    """One clip as a model sees it.

    A landmark that is missing is NaN in every channel of the features, which are read-only.
    """

    uid: str  # its name in the table
    text: str  # its translation
    features: npt.NDArray[np.floating[Any]]  # float16 [frames, points, channels], a view into the map
    video: str = ""  # the source video
    language: str = ""  # its sign language; empty if the table has none
    hands_visible: float = 1.0  # share of frames that show at least one hand
    target_language: str = ""  # of the text; this and the following are empty if the table has none
    prompt: str = ""
    context: str = ""
    signer: str = ""
    gloss: str = ""  # separated by spaces
    video_features: npt.NDArray[np.float16] | None = None  # of another network [frames, dimensions], if there are any

    @property
    def conditions(self) -> dict[str, str]:
        """What a prefix may say about the clip."""
        return {name: getattr(self, name) for name in CONDITIONS}


@dataclass(frozen=True)
class Metadata:
    """How the features of a corpus were made."""

    landmark_set: dict[str, Any]  # ``LandmarkSet.to_dict()``
    fps: float  # frames per second of the features
    normalisation: str  # description of the origin and unit of the coordinates
    max_frames: int | None = None  # the lengths that were accepted, and how longer clips were treated
    min_frames: int = 1
    too_long: str = "subsample"
    no_hands: str = "keep"  # how clips without hands were treated
    shared_texts: str = "keep"  # how held-out clips whose text is in train were treated
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # of each the number of ``clips`` and ``frames``
    counts: dict[str, int] = field(default_factory=dict)  # rejected, shortened, without hands ...
    checksums: dict[str, str] = field(default_factory=dict)  # xxh3 of table and clips
    leakage: dict[str, int] = field(default_factory=dict)  # texts and videos that splits share
    lacking: dict[str, int] = field(default_factory=dict)  # landmarks -> clips that lack them
    versions: dict[str, str] = field(default_factory=dict)  # of the toolkit that wrote it
    num_features: int = 0  # numbers of a frame that another network made of the video
    format_version: int = FORMAT_VERSION

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.landmark_set["channels"])


@dataclass(frozen=True)
class Part:
    """The clips of a split that come from one corpus."""

    corpus: str  # its name
    clips: range  # their indices in the split
    weights: tuple[float, float] | None = None  # in a mix, at the start and at the end of a run; None = by size


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


# Views of a record batch: those columns (None where all texts are empty), frame offsets [clips + 1], and all frames of
# each array of a clip.
_Chunk = tuple[dict[str, pa.Array | None], npt.NDArray[np.int64], dict[str, npt.NDArray[np.float16]]]


class Split:
    """One split of a corpus: an indexed sequence of clips.

    It is pickled as its path, so worker processes map the files themselves.
    """

    def __init__(self, folder: Path, num_points: int, num_channels: int, num_features: int = 0) -> None:
        self.folder = folder
        self.num_points = num_points
        self.num_channels = num_channels
        self.num_features = num_features

    @property
    def name(self) -> str:
        return self.folder.name

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def parts(self) -> tuple[Part, ...]:
        """The corpora that its clips come from: one."""
        return (Part(self.folder.parent.name, range(len(self))),)

    @cached_property
    def frames(self) -> npt.NDArray[np.int32]:
        """Frames of each clip, int32 [clips]."""
        return np.ascontiguousarray(self._table.column("frames").to_numpy())

    @property
    def uids(self) -> Column:
        return Column(self._table.column("uid"))

    @property
    def texts(self) -> Column:
        return Column(self._table.column("text"))

    def values(self, column: str) -> Sequence[str]:
        """What a column says of each clip; empty texts where the corpus was made without it."""
        there = column in self._table.column_names
        return Column(self._table.column(column)) if there else [""] * len(self)

    def conditions(self) -> Iterator[dict[str, str]]:
        """What a prefix may say about each clip, as :attr:`Clip.conditions`."""
        columns = [
            Column(self._table.column(name)) if name in self._columns else repeat("", len(self)) for name in CONDITIONS
        ]
        return (dict(zip(CONDITIONS, values, strict=True)) for values in zip(*columns, strict=True))

    def condition_counts(self) -> Iterator[tuple[dict[str, str], int]]:
        """Each combination of conditions, and how many clips have it."""
        there = [name for name in CONDITIONS if name in self._columns]
        counted = self._table.select(there).group_by(there, use_threads=False).aggregate([([], "count_all")])
        for row in counted.to_pylist():
            clips = row.pop("count_all")
            yield dict.fromkeys(CONDITIONS, "") | row, clips

    @property
    def hands_visible(self) -> npt.NDArray[np.float32]:
        """Share of frames that show at least one hand, float32 [clips]."""
        return self._table.column("hands_visible").to_numpy()

    def clip(self, index: int) -> Clip:
        """The clip at ``index``; its arrays are views into the map.

        Raises:
            IndexError: there is no such clip.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)} in split {self.name}")
        chunk = bisect_right(self._chunk_starts, index) - 1
        row = index - self._chunk_starts[chunk]
        columns, offsets, arrays = self._chunk(chunk)
        frames = slice(offsets[row], offsets[row + 1])
        values: dict[str, Any] = {
            name: column[row].as_py() if column is not None else "" for name, column in columns.items()
        }
        return Clip(**values | {name: of_all[frames] for name, of_all in arrays.items()})

    def __iter__(self) -> Iterator[Clip]:
        return (self.clip(index) for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        sizes = ("num_points", "num_channels", "num_features")
        return {"folder": self.folder, **{name: getattr(self, name) for name in sizes}}

    @cached_property
    def _table(self) -> pa.Table:
        shards = sorted(self.folder.glob("data-*.arrow"))
        return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(shard))).read_all() for shard in shards)

    @cached_property
    def _columns(self) -> list[str]:
        """The columns that a clip is made of, besides its features."""
        there = set(self._table.column_names)
        return [name for name in (*TEXT_COLUMNS, "hands_visible") if name in there or name not in LATER_COLUMNS]

    @cached_property
    def _chunk_starts(self) -> list[int]:
        """Index of the first clip of each record batch."""
        sizes = [len(chunk) for chunk in self._table.column("frames").chunks]
        return list(accumulate(sizes[:-1], initial=0))

    def _chunk(self, chunk: int) -> _Chunk:
        if chunk not in self._chunks:
            columns = {name: _unless_empty(self._table.column(name).chunk(chunk)) for name in self._columns}
            frames = self._table.column("frames").chunk(chunk).to_numpy()
            offsets = np.concatenate([[0], np.cumsum(frames, dtype=np.int64)])
            arrays = {
                name: self._values(name, chunk).reshape(offsets[-1], *shape) for name, shape in self._shapes.items()
            }
            if len(self._chunks) == MOST_CHUNKS:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[chunk] = (columns, offsets, arrays)
        return self._chunks[chunk]

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays that a clip is made of, each with the shape of one frame."""
        shapes: dict[str, tuple[int, ...]] = {"features": (self.num_points, self.num_channels)}
        return shapes | ({"video_features": (self.num_features,)} if self.num_features else {})

    def _values(self, name: str, chunk: int) -> npt.NDArray[np.float16]:
        """The values of all frames of one record batch; poses without landmarks have no column."""
        if name not in self._table.column_names:
            return np.empty(0, np.float16)
        lists = self._table.column(name).chunk(chunk)
        values: npt.NDArray[np.float16] = lists.values.flatten().to_numpy(zero_copy_only=True)
        return values

    @cached_property
    def _chunks(self) -> dict[int, _Chunk]:
        return {}


def _unless_empty(column: pa.Array) -> pa.Array | None:
    """A column, None where all of its texts are empty: each value that is read costs half a microsecond."""
    if column.type != pa.string():
        return column
    ends = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, 4 * column.offset)
    return column if ends[0] != ends[-1] else None


@dataclass(frozen=True)
class Corpus:
    """A packed corpus, opened."""

    path: Path  # its folder
    metadata: Metadata  # how its features were made
    splits: dict[str, Split]  # by name, e.g. train, dev, test.
    members: dict[str, Corpus] = field(default_factory=dict)  # of a mix the corpora, by name; see ``mixture``

    @property
    def landmark_set(self) -> LandmarkSet:
        return LandmarkSet.from_dict(self.metadata.landmark_set)

    def summary(self) -> dict[str, Any]:
        """What preparation prints: ``path, clips, frames, rejects, splits, leakage, counts, lacking, bytes``."""
        counts = dict(self.metadata.counts)
        return {
            "path": str(self.path),
            "clips": sum(split["clips"] for split in self.metadata.splits.values()),
            "frames": sum(split["frames"] for split in self.metadata.splits.values()),
            "rejects": counts.pop("rejects", 0),
            "splits": {name: split["clips"] for name, split in self.metadata.splits.items()},
            "leakage": self.metadata.leakage,
            "counts": counts,
            "lacking": self.metadata.lacking,
            "bytes": sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()),
        }

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a corpus; only its metadata is read.

        Raises:
            UserError: there is no corpus, or another version of the toolkit wrote it.
        """
        path = Path(path)
        try:
            content = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
            version = content["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a prepared corpus: it has no readable {METADATA_FILE}",
                "prepare one with launch/prepare.py, and set data.corpus to its folder",
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"the corpus {path} has format {version}, this toolkit reads {FORMAT_VERSION}",
                "prepare it again with launch/prepare.py",
            )
        known = {item.name for item in fields(Metadata)}
        metadata = Metadata(**{key: value for key, value in content.items() if key in known})
        sizes = len(metadata.landmark_set["points"]), len(metadata.channels), metadata.num_features
        splits = {name: Split(path / name, *sizes) for name in metadata.splits}
        return cls(path, metadata, splits)
