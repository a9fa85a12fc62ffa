"""The clips to translate: files, videos, folders, archives, members of archives, and standard input.

All are found before any is read, so that a mistyped name is reported at once; clips are read one at a time.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from toolkit.corpus.archives.files import PoseFiles, open_features, open_poses
from toolkit.corpus.names import FEATURE_SUFFIXES, SUFFIXES, Names, escaped, is_pose_file
from toolkit.errors import UserError
from toolkit.poses.features import read_clip
from toolkit.poses.pose_file import PoseError, RawPose, read_pose
from toolkit.poses.video import VIDEO_SUFFIXES, read_video
from toolkit.poses.video_features import RawFeatures, Recording, read_features

STDIN = "-"
MAP_FROM = 64 << 20
"""Bytes from which a ``.pose`` file is mapped instead of read: a recording of hours then costs no memory."""


@dataclass(frozen=True)
class ClipSource:
    """One clip that can be read."""

    uid: str  # the file's name without suffix, in folders and archives with its path there
    where: str  # its name in messages
    read: Callable[[], RawPose]  # reads it; raises PoseError
    is_video: bool = False  # whether landmarks must be found first
    content: Callable[[], bytes] | None = None  # reads its bytes; raises PoseError; None for a video

    def recording(self) -> Recording:
        """It as recorded; raises PoseError."""
        return Recording(self.read())


@dataclass(frozen=True)
class FeatureSource(ClipSource):
    """A clip for a model that reads what another network made of the video, besides its poses or instead of them."""

    features: Callable[[], RawFeatures] | None = None  # reads them; raises PoseError
    has_poses: bool = False  # whether the model reads poses, too

    def recording(self) -> Recording:
        assert self.features
        return Recording(self.read() if self.has_poses else None, self.features())


def with_features(
    clips: list[ClipSource], extractor: Any, features: Path | None, fps: float | None
) -> list[ClipSource]:
    """The clips as a model reads them, where it reads features; the clips themselves where it reads poses alone.

    Args:
        clips: that the user names: feature files for a model that reads these alone, else poses.
        extractor: of the model.
        features: folder, archive or file with the features of the clips, by their names.
        fps: frame rate of the features, where files name none.

    Raises:
        UserError: ``features`` is missing, or not for this model; a clip has none there.
    """
    reads_poses = bool(extractor.landmark_set.get("points"))
    if bool(features) != bool(extractor.num_features and reads_poses):
        if features:
            alone = "features alone" if extractor.num_features else "poses alone"
            raise UserError(f"--features: the model reads {alone}", "leave --features out, and name the clips")
        raise UserError(
            f"the model reads poses and {extractor.num_features} features a frame", "add --features FOLDER or FILE"
        )
    if not extractor.num_features:
        return clips
    if features is None:
        return [_of_content(clip, fps) for clip in clips]
    if features.is_file() and len(clips) == 1 and features.name.lower().endswith(FEATURE_SUFFIXES):
        return [_beside(clips[0], lambda: read_features(_bytes_of(features), fps))]
    files = open_features(features)
    return [_found_in(files, clip, fps) for clip in clips]


def _of_content(clip: ClipSource, fps: float | None) -> ClipSource:
    if clip.content is None:
        raise UserError(f"{clip.where}: the model reads features, and this is a video", "name the file of its features")
    content = clip.content
    return FeatureSource(clip.uid, clip.where, clip.read, features=lambda: read_features(content(), fps))


def _found_in(files: PoseFiles, clip: ClipSource, fps: float | None) -> ClipSource:
    from toolkit.corpus.table import Row  # what reads tables takes long to import

    row = Row(clip.uid, "")
    key = files.find(row)
    if key is None:
        raise UserError(f"{clip.where}: {files.reason_not_found(row)[0]}", "check --features")
    return _beside(clip, lambda: read_features(files.read(key), fps))


def _beside(clip: ClipSource, features: Callable[[], RawFeatures]) -> ClipSource:
    return FeatureSource(clip.uid, clip.where, clip.read, clip.is_video, features=features, has_poses=True)


def find_clips(names: Iterable[str], fps: float | None = None) -> list[ClipSource]:
    """All clips of these names, in this order; those of a folder or archive in the order of their names.

    A name is a file, video, folder, zip or tar, ``archive.zip:member``, or ``-`` for standard input. ``fps``, frames
    per second of all clips, overrules what the files say.

    Raises:
        UserError: one of them does not exist, or holds no clip.
    """
    clips = [clip for name in names for clip in _find(name, fps)]
    if not clips:
        raise UserError("no clip is named", "give .pose files, folders, archives, or - for standard input")
    times = Counter(clip.uid for clip in clips)
    return [replace(clip, uid=clip.where) if times[clip.uid] > 1 else clip for clip in clips]


def _find(name: str, fps: float | None) -> Iterable[ClipSource]:
    if name == STDIN:
        stdin = partial(_read_all, sys.stdin.buffer)
        return [ClipSource("stdin", "standard input", lambda: read_clip(stdin(), fps), content=stdin)]
    path = Path(name)
    # os.path, because pathlib's functions raise for a name that is too long.
    if os.path.isdir(path):
        return _in_folder(path, fps)
    if path.name.lower().endswith((*SUFFIXES, *FEATURE_SUFFIXES, *VIDEO_SUFFIXES)) and os.path.isfile(path):
        return [_file(path, path.stem, fps)]
    if _is_archive(path):
        poses = _open_archive(path)
        return [_clip_of(path, poses, name, fps) for name in sorted(poses.files)]
    for place, letter in enumerate(name):
        if letter == ":" and _is_archive(Path(name[:place])):
            return [_member(Path(name[:place]), name[place + 1 :], fps)]
    if os.path.exists(path):
        known = ", ".join((*SUFFIXES, *VIDEO_SUFFIXES))
        raise UserError(f"{name} is no clip, folder, zip or tar", f"give a file that ends in one of {known}")
    return [_spelled_otherwise(path, fps)]


def _spelled_otherwise(path: Path, fps: float | None) -> ClipSource:
    """The one file whose name differs from this one in the form of its letters or in its suffix alone."""
    folder = path.parent
    files = [entry.name for entry in os.scandir(folder) if entry.is_file()] if os.path.isdir(folder) else []
    beside = Names(filter(is_pose_file, files))
    found = beside.match(path.name)
    if len(found) == 1:
        file = folder / found[0]
        return _file(file, file.stem, fps)
    if found:
        raise UserError(f"{escaped(str(path))} names several files", f"name one of {', '.join(map(escaped, found))}")
    near = f"the nearest is {escaped(str(folder / beside.nearest(path.name)))}" if beside.names else "check the path"
    raise UserError(f"there is no file or folder {escaped(str(path))}", near)


def _is_archive(path: Path) -> bool:
    """Whether this is a zip or tar by its name, or a part of one (``x.zip.part_aa``)."""
    return os.path.isfile(path) and any(f"{suffix}." in f"{path.name.lower()}." for suffix in (".zip", ".tar"))


def _file(path: Path, uid: str, fps: float | None) -> ClipSource:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return ClipSource(uid, str(path), partial(read_video, path, fps), is_video=True)
    return ClipSource(uid, str(path), partial(_read_file, path, fps), content=partial(_bytes_of, path))


def _in_folder(folder: Path, fps: float | None) -> Iterator[ClipSource]:
    files = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    found = [path for path in files if is_pose_file(path.name) or path.name.lower().endswith(VIDEO_SUFFIXES)] or [
        path for path in files if is_pose_file(path.name, FEATURE_SUFFIXES)
    ]
    if not found:
        raise UserError(
            f"{folder} holds no clip",
            f"give a folder with files that end in one of {', '.join((*SUFFIXES, *VIDEO_SUFFIXES))}",
        )
    for path in found:
        yield _file(path, path.relative_to(folder).with_suffix("").as_posix(), fps)


def _member(path: Path, name: str, fps: float | None) -> ClipSource:
    poses = _open_archive(path)
    found = poses.names.match(name)
    if not found:
        nearest = escaped(poses.names.nearest(name))
        raise UserError(f"{path} holds no clip {escaped(name)}", f"the nearest is {nearest}")
    if len(found) > 1:
        candidates = ", ".join(map(escaped, found))
        raise UserError(f"several clips in {path} may be {escaped(name)}", f"name one of {candidates}")
    return _clip_of(path, poses, found[0], fps)


def _open_archive(path: Path) -> PoseFiles:
    try:
        return open_poses(path)
    except UserError as error:
        # The hint of open_poses names settings of recipes.
        raise UserError(error.message, "name a folder, zip or tar of pose files") from error


def _clip_of(path: Path, poses: PoseFiles, name: str, fps: float | None) -> ClipSource:
    uid, key = str(PurePosixPath(name).with_suffix("")), poses.files[name]
    content = partial(poses.read, key)
    return ClipSource(uid, f"{path}:{name}", lambda: read_clip(content(), fps), content=content)


def _read_file(path: Path, fps: float | None) -> RawPose:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size >= MAP_FROM and path.suffix.lower() == ".pose":
                return read_pose(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), fps)
            return read_clip(_read_all(file), fps)
    except OSError as error:
        raise PoseError(f"the file cannot be read: {error.strerror or error}") from error


def _bytes_of(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return _read_all(file)
    except OSError as error:
        raise PoseError(f"the file cannot be read: {error.strerror or error}") from error


def _read_all(file: Any) -> bytes:
    content: bytes = file.read()
    if not content:
        raise PoseError("the clip is empty")
    return content
