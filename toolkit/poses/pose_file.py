"""Read the binary ``.pose`` format, versions 0.0, 0.1 and 0.2.

This parser replaces that of the pose-format library for three reasons: features need a tenth of the points, and views
copy only those; a file whose length and header disagree is an error; and frame ranges work in every version (the
library ignores times in v0.1 files).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toolkit.poses.layouts import mediapipe_names
from toolkit.poses.people import follow_signer, locate_people_in_frames

FloatArray = npt.NDArray[np.float32]

# Frames per second. Phones record up to 240: a file with a higher rate is wrong, a user who gives one may be right.
_FASTEST_CLAIMED = 300
_FASTEST_GIVEN = 1000
MOST_PEOPLE = 32  # in a frame; following a person compares all with all
_MOST_POINTS = 1 << 16
# A frame that shows nobody takes two bytes of a file, or one, and as much memory as any other.
_DENSE_PER_BYTE, _DENSE_BEYOND = 4, 100 << 20
USUAL_FPS = (10, 120)
"""Frame rates at which sign language is usually recorded; clips of other rates are counted."""


_WRITE_SECONDS = (
    "write start and end in seconds of the file, or set data.time_unit (--time-unit) to milliseconds or frames"
)


class PoseError(ValueError):
    """A clip cannot be used.

    Args:
        reason: what is wrong with it, as ``rejects.csv`` gives it.
        hint: the remedy; empty where the file itself must be replaced.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, eq=False)  # compared by identity: comparing hundreds of names would take longer than reading
class PoseHeader:
    """The header of a file: the names of its points and their layout. Equal headers are one object."""

    version: float
    points: tuple[tuple[str, str], ...]
    """(component, point) of every point, in file order, by the names that landmark sets use."""
    component_sizes: tuple[tuple[int, int], ...]
    """Of each component: the number of its points and of its coordinates (without the confidence)."""
    width: int = 0
    """Width of the picture in pixels, 0 when unknown."""

    @property
    def dims(self) -> int:
        return max(dims for _, dims in self.component_sizes)


@dataclass(frozen=True)
class RawPose:
    """One clip as recorded."""

    fps: float  # frames per second
    header: PoseHeader  # names of the points
    data: FloatArray  # float32 [frames, people, points, dims], usually pixels; a view of the file's bytes if possible
    confidence: FloatArray  # float32 [frames, people, points]; 0 means missing

    @property
    def num_frames(self) -> int:
        return len(self.data)

    def between(self, start: float | None, end: float | None) -> RawPose:
        """The frames shown in [start, end) seconds; raises PoseError where no frame lies there."""
        if start is None and end is None:
            return self
        frames = frames_between(start, end, self.num_frames, self.fps)
        return RawPose(self.fps, self.header, self.data[frames], self.confidence[frames])


def frames_between(start: float | None, end: float | None, num_frames: int, fps: float) -> slice:
    """The frames shown in [start, end) seconds of a file; frame ``i`` is shown at ``i / fps``.

    Raises:
        PoseError: no frame lies there.
    """
    first = int(np.ceil(max(start or 0.0, 0.0) * fps - 1e-6))
    last = num_frames if end is None else min(num_frames, int(np.ceil(end * fps - 1e-6)))
    length = num_frames / fps
    if start is not None and end is not None and end <= start:
        raise PoseError(f"its end, {end:g} s, is not after its start, {start:g} s", "correct start and end")
    if end is not None and end > 2 * length + 1:
        raise PoseError(f"its end, {end:g} s, is far beyond the file's, {length:.2f} s", _WRITE_SECONDS)
    if first >= last:
        raise PoseError(f"no frame between {start} s and {end} s: the file ends at {length:.2f} s", _WRITE_SECONDS)
    return slice(first, last)


class _Reader:
    """A cursor over bytes; reading past their end is an error."""

    def __init__(self, content: bytes | memoryview, offset: int = 0) -> None:
        self.content = content
        self.offset = offset

    def take(self, size: int) -> int:
        """Skip ``size`` bytes and return where they begin."""
        start = self.offset
        if size > len(self.content) - start:
            raise PoseError("the file is truncated")
        self.offset = start + size
        return start

    def unpack(self, layout: struct.Struct) -> tuple[float, ...]:
        return layout.unpack_from(self.content, self.take(layout.size))

    def ushorts(self, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}H", self.content, self.take(2 * count))

    def text(self) -> str:
        (size,) = self.ushorts(1)
        start = self.take(size)
        return bytes(self.content[start : start + size]).decode("utf-8", errors="replace")

    def floats(self, *shape: int) -> FloatArray:
        count = int(np.prod(shape, dtype=object)) if shape else 1
        start = self.take(4 * count)
        return np.frombuffer(self.content, "<f4", count, start).reshape(shape)


_FLOAT = struct.Struct("<f")
_V02_SIZES = struct.Struct("<fIH")
_V01_OVERFLOW = 1 << 16

# The files of one corpus share their header, and parsing its hundreds of names takes longer than reading a clip.
_recent_headers: dict[bytes, PoseHeader] = {}


def read_pose(content: bytes | memoryview, fps: float | None = None) -> RawPose:
    """Parse the bytes of a ``.pose`` file; ``fps``, frames per second, overrules the file.

    Raises:
        PoseError: the bytes are not a usable pose file; the message says why.
    """
    reader = _Reader(content)
    header = _read_header(reader)
    if round(header.version, 3) == 0.2:
        claimed_fps, frames, people = reader.unpack(_V02_SIZES)
        data, confidence = _read_dense(reader, header, int(frames), int(people))
    elif round(header.version, 3) == 0.1:
        claimed_fps, claimed_frames, people = reader.ushorts(3)
        frames = _v01_frames(reader, header, int(claimed_frames), int(people))
        data, confidence = _read_dense(reader, header, frames, int(people))
    else:
        claimed_fps, frames = reader.ushorts(2)
        data, confidence = _read_sparse(reader, header, frames)
    if reader.offset != len(content):
        # A count that is too small would read confidences out of coordinates.
        raise PoseError(f"{len(content) - reader.offset:,} bytes are left over after the frames that the file claims")
    return RawPose(checked_fps(claimed_fps, fps), header, data, confidence)


def checked_fps(claimed: float, given: float | None = None) -> float:
    """The frame rate that a file claims, or the one ``given`` by the table or the user, which overrules it.

    Raises:
        PoseError: the rate is not one that a camera has.
    """
    if given is not None:
        if not 1 <= given <= _FASTEST_GIVEN:
            raise PoseError(f"the table's fps column says {given:g} frames per second, wanted 1 to {_FASTEST_GIVEN:,}")
        return float(given)
    if not 1 <= claimed <= _FASTEST_CLAIMED:  # true for NaN
        raise PoseError(
            f"the file claims {claimed:g} frames per second, which no camera has",
            "write the right rate into the table's fps column (translate.py: --fps)",
        )
    return float(claimed)


def _read_header(reader: _Reader) -> PoseHeader:
    content = reader.content
    for known, header in _recent_headers.items():
        if content[: len(known)] == known:
            reader.offset = len(known)
            return header
    (version,) = reader.unpack(_FLOAT)
    if version != 0 and round(version, 3) not in (0.1, 0.2):
        if bytes(content[:23]) == b"version https://git-lfs":
            raise PoseError("a pointer of Git LFS, not the file itself", "download the files by git lfs pull")
        raise PoseError("not a .pose file, or of an unknown version")
    width, _, _, num_components = reader.ushorts(4)
    if num_components == 0:
        raise PoseError("the header names no components")
    points: list[tuple[str, str]] = []
    total = 0
    sizes: list[tuple[int, int]] = []
    for _ in range(num_components):
        name, layout = reader.text(), reader.text()
        num_points, num_limbs, num_colors = reader.ushorts(3)
        if not 3 <= len(layout) <= 5:
            raise PoseError("the header names a point format other than XYC or XYZC")
        total += num_points
        if total > _MOST_POINTS:
            raise PoseError(f"the header names more than {_MOST_POINTS:,} points")
        points += mediapipe_names(name, [reader.text() for _ in range(num_points)])
        reader.take(4 * num_limbs + 6 * num_colors)
        sizes.append((num_points, len(layout) - 1))
    if not points:
        raise PoseError("the header names no points")
    header = PoseHeader(float(version), tuple(points), tuple(sizes), width)
    if len(_recent_headers) >= 4:
        _recent_headers.pop(next(iter(_recent_headers)))
    _recent_headers[bytes(content[: reader.offset])] = header
    return header


def _v01_frames(reader: _Reader, header: PoseHeader, claimed: int, people: int) -> int:
    """How many frames follow. The 16-bit count of v0.1 overflows, so the length of the file gives their number.

    Raises:
        PoseError: count and length disagree: the file is truncated, or its sizes are wrong.
    """
    frame_bytes = 4 * people * len(header.points) * (header.dims + 1)
    if not frame_bytes:
        return 0
    frames, rest = divmod(len(reader.content) - reader.offset, frame_bytes)
    if rest or (frames - claimed) % _V01_OVERFLOW:
        what = "is truncated" if frames < claimed else "is longer than it says"
        raise PoseError(
            f"the file {what}: its length is that of {frames + rest / frame_bytes:g} frames, its header claims "
            f"{claimed}"
        )
    return frames


def _read_dense(reader: _Reader, header: PoseHeader, frames: int, people: int) -> tuple[FloatArray, FloatArray]:
    """The body of v0.1 and v0.2: all coordinates, then all confidences."""
    if frames == 0 or people == 0:
        raise PoseError("the file holds no frames" if frames == 0 else "the file holds no people")
    check_people(people)
    points = len(header.points)
    return reader.floats(frames, people, points, header.dims), reader.floats(frames, people, points)


def _read_sparse(reader: _Reader, header: PoseHeader, frames: int) -> tuple[FloatArray, FloatArray]:
    """The signer in the body of v0.0: a count of people in every frame, each with a block of every component."""
    if frames == 0:
        raise PoseError("the file holds no frames")
    block = 2 + 4 * sum(points * (dims + 1) for points, dims in header.component_sizes)  # the first is the person's id
    starts, counts = [], []
    for _ in range(frames):
        (people,) = reader.ushorts(1)
        starts.append(reader.take(people * block))
        counts.append(people)
    if not any(counts):
        raise PoseError("the file holds no people")
    check_people(max(counts))
    points, dims = len(header.points), header.dims
    check_dense(frames, points, dims, len(reader.content))

    def people_of(frame: int) -> tuple[FloatArray, FloatArray]:
        blocks = np.frombuffer(reader.content, np.uint8, counts[frame] * block, starts[frame])
        return _unpack_people(blocks.reshape(counts[frame], block)[:, 2:].copy().view("<f4"), header)

    places = [min(count, 1) - 1 for count in counts]
    if max(counts) > 1:
        places = follow_signer(locate_people_in_frames(counts, people_of)).tolist()
    data, confidence = np.zeros((frames, 1, points, dims), np.float32), np.zeros((frames, 1, points), np.float32)
    for frame, place in enumerate(places):
        if place >= 0:
            found = people_of(frame)
            data[frame], confidence[frame] = found[0][place], found[1][place]
    return data, confidence


def _unpack_people(blocks: FloatArray, header: PoseHeader) -> tuple[FloatArray, FloatArray]:
    """Coordinates [people, points, dims] and confidences [people, points] of one frame of a v0.0 file."""
    data = np.zeros((len(blocks), len(header.points), header.dims), np.float32)
    confidence = np.zeros(data.shape[:2], np.float32)
    offset = point = 0
    for count, dims in header.component_sizes:
        part = blocks[:, offset : offset + count * (dims + 1)].reshape(len(blocks), count, dims + 1)
        data[:, point : point + count, :dims] = part[..., :-1]
        confidence[:, point : point + count] = part[..., -1]
        offset, point = offset + count * (dims + 1), point + count
    return data, confidence


def check_people(most: int) -> None:
    """Refuse a clip that shows a crowd.

    Args:
        most: people of one frame.

    Raises:
        PoseError: they are too many.
    """
    if most > MOST_PEOPLE:
        raise PoseError(f"the file has {most:,} people in one frame, at most {MOST_PEOPLE} are read")


def check_dense(frames: int, points: int, dims: int, size: int) -> None:
    """Refuse a clip that needs much more memory than its file, because most of its frames show nobody.

    Args:
        frames: their number, with or without people.
        points: of a person.
        dims: coordinates of a point; its confidence comes beside them.
        size: bytes of the file.

    Raises:
        PoseError: it does.
    """
    needed = 4 * frames * points * (dims + 1)
    if needed > _DENSE_PER_BYTE * size + _DENSE_BEYOND:
        raise PoseError(
            f"the file claims {frames:,} frames of {points:,} points and has {size:,} bytes: nearly all show nobody"
        )
