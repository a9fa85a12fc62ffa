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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from toolkit.corpus.columns import NO_TEXTS, Column, TextViews, text_views
from toolkit.errors import UserError
from toolkit.poses.landmarks import LandmarkSet
from toolkit.recipe.prompts import CONDITIONS

FORMAT_VERSION = 1
METADATA_FILE = "corpus.json"
MOST_CHUNKS = 1024  # whose views a process keeps; 30 KiB each
MOST_KEPT = 32_768  # clips of a split whose views and texts a process keeps, the first that it reads; 0.7 KiB each
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
class Clips:
    """Several clips, column by column: reading them so takes a tenth of the time of as many :class:`Clip`."""

    texts: dict[str, list[str]]  # of each of ``TEXT_COLUMNS`` what the clips say
    features: list[npt.NDArray[np.floating[Any]]]  # of each clip, as :class:`Clip` has them
    video_features: list[npt.NDArray[np.float16]] | None = None  # the same; None where clips have none

    def __len__(self) -> int:
        return len(self.features)

    def conditions(self) -> Iterator[dict[str, str]]:
        """What a prefix may say about each clip."""
        columns = (self.texts[name] for name in CONDITIONS)
        return (dict(zip(CONDITIONS, values, strict=True)) for values in zip(*columns, strict=True))

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> Clips:
        """These clips."""
        texts = {name: [getattr(clip, name) for clip in clips] for name in TEXT_COLUMNS}
        found = [clip.video_features for clip in clips if clip.video_features is not None]
        return cls(texts, [clip.features for clip in clips], found or None)

    @classmethod
    def joined(cls, parts: Sequence[Clips], order: Sequence[int]) -> Clips:
        """The clips of several, one after the other, and then in this order."""

        def together(lists: Iterable[list[Any]]) -> list[Any]:
            values = [*chain.from_iterable(lists)]
            return [values[place] for place in order]

        texts = {name: together(part.texts[name] for part in parts) for name in TEXT_COLUMNS}
        found = together(part.video_features or [] for part in parts) if parts[0].video_features else None
        return cls(texts, together(part.features for part in parts), found)


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


class _Chunk(NamedTuple):
    """Views of a record batch."""

    texts: list[TextViews]  # of each of ``TEXT_COLUMNS``
    offsets: memoryview  # int64 [clips + 1], of its frames
    arrays: list[npt.NDArray[np.float16]]  # of each of ``_shapes`` all frames


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
        read = self.read([index])
        texts = {name: of_clips[0] for name, of_clips in read.texts.items()}
        hands = self._table.column("hands_visible")[index].as_py()
        features = read.video_features[0] if read.video_features else None
        return Clip(**texts, features=read.features[0], hands_visible=hands, video_features=features)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Clips:
        """The clips at these indices, as a batch needs them; their arrays are views into the map.

        Raises:
            IndexError: one of them is not there.
        """
        # A clip is found in one step of Python: more would take longer than copying a short one.
        wanted = np.asarray(indices).tolist()
        rows = [*map(self._kept.get, wanted)]
        if None in rows:
            missing = [index for index, row in zip(wanted, rows, strict=True) if row is None]
            found = dict(zip(missing, self._rows(missing), strict=True))
            self._kept.update(islice(found.items(), MOST_KEPT - len(self._kept)))
            rows = [row or found[index] for index, row in zip(wanted, rows, strict=True)]
        columns: list[Any] = [*map(list, zip(*rows, strict=True))] or [[] for _ in (*self._shapes, *TEXT_COLUMNS)]
        arrays = dict(zip(self._shapes, columns, strict=False))
        return Clips(dict(zip(TEXT_COLUMNS, columns[len(arrays) :], strict=True)), **arrays)

    def _rows(self, indices: list[int]) -> Iterator[tuple[Any, ...]]:
        """Of each clip its arrays and texts, in the order of ``_shapes`` and ``TEXT_COLUMNS``."""
        places = np.searchsorted(self._chunk_starts, indices, side="right") - 1
        rows = (indices - self._chunk_starts[places]).tolist()  # in their record batches
        if min(rows) < 0:
            raise IndexError(f"an index below 0 in split {self.name}")
        for chunk, row in zip(map(self._chunk, places.tolist()), rows, strict=True):
            span = slice(chunk.offsets[row], chunk.offsets[row + 1])
            texts = [str(data[ends[row] : ends[row + 1]], "utf-8") if data else "" for ends, data in chunk.texts]
            yield *[array[span] for array in chunk.arrays], *texts

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
        """The columns of texts; corpora of earlier versions lack some."""
        there = set(self._table.column_names)
        return [name for name in TEXT_COLUMNS if name in there or name not in LATER_COLUMNS]

    @cached_property
    def _kept(self) -> dict[int, tuple[Any, ...]]:
        """What :meth:`_rows` gave, by index."""
        return {}

    @cached_property
    def _chunk_starts(self) -> npt.NDArray[np.int64]:
        """Index of the first clip of each record batch."""
        sizes = [len(chunk) for chunk in self._table.column("frames").chunks]
        return np.array([0, *accumulate(sizes[:-1])])

    def _chunk(self, chunk: int) -> _Chunk:
        if (found := self._chunks.get(chunk)) is not None:
            return found
        there = {*self._columns}
        texts = [
            text_views(self._table.column(name).chunk(chunk)) if name in there else NO_TEXTS for name in TEXT_COLUMNS
        ]
        frames = self._table.column("frames").chunk(chunk).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(frames, dtype=np.int64)])
        arrays = [self._values(name, chunk).reshape(offsets[-1], *shape) for name, shape in self._shapes.items()]
        if len(self._chunks) == MOST_CHUNKS:
            self._chunks.pop(next(iter(self._chunks)))
        self._chunks[chunk] = _Chunk(texts, offsets.data, arrays)
        return self._chunks[chunk]

    @cached_property
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
