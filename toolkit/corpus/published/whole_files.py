"""Read tables that are one JSON or one pickle of all clips, as public corpora have them, into records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import UserError, first_line
from toolkit.poses.compressed import decompress
from toolkit.poses.pickles import read_pickle
from toolkit.poses.pose_file import PoseError

_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_GZIP = b"\x1f\x8b"
_ORDER = "clip_order"
# Bytes of memory of a list or an object, which may take two characters of a file.
_CONTAINER, _MOST_COST, _COST_BEYOND = 96, 6, 100 << 20


def is_whole(path: Path) -> bool:
    """Whether a table is one pickle, or one JSON by its name or its first characters, and not lines."""
    with open(path, "rb") as file:
        beginning = file.read(64)
    if beginning.startswith((*_PICKLE, _GZIP)):
        return True
    return path.suffix.lower() in (".json", ".pkl", ".pickle") or beginning.lstrip(b"\xef\xbb\xbf \n\r\t").startswith(
        (b"[", b"{\n")
    )


def read_whole(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The records of such a table, numbered from 1; numpy's numbers and arrays have become Python's.

    Of a list each element is a record, of an object each value, whose key is ``uid`` unless it has one. Objects of
    clips by video (with ``clip_order``) give a record for each clip, with its ``uid`` and its ``video``; of
    ``{"info": [...]}`` the list is read.

    Raises:
        UserError: the file is damaged, holds other objects than plain ones and arrays, or holds no records.
    """
    content = _content(path)
    found: Any = content
    if isinstance(content, dict) and isinstance(content.get("info"), list):
        found = content["info"]
    records = _of_videos(path, found) if _has_videos(found) else _of_clips(path, found)
    for number, record in enumerate(records, 1):
        yield number, {str(name): _plain(value) for name, value in record.items()}


def _content(path: Path) -> Any:
    try:
        content = decompress(path.read_bytes())
        # Protocols 0 and 1 have no mark at their beginning.
        if content.startswith(_PICKLE) or (content[:1] not in b"[{" and content.endswith(b".")):
            return read_pickle(content)
    except PoseError as error:
        raise UserError(f"{path}: {error}", error.hint or "save its records as JSON or CSV") from error
    except Exception as error:
        # A damaged pickle raises whatever the object that it claims to be does.
        raise UserError(
            f"{path} is not a readable pickle: {type(error).__name__}: {first_line(error)}", "download it again"
        ) from error
    if _CONTAINER * (content.count(b"{") + content.count(b"[")) > _MOST_COST * len(content) + _COST_BEYOND:
        raise UserError(f"{path} holds more lists and objects than texts", "check data.table (--table)")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is neither one JSON nor one pickle: {first_line(error)}", "download it again"
        ) from error


def _has_videos(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(video, dict) and _ORDER in video for video in content.values())


def _of_videos(path: Path, videos: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, video in videos.items():
        order = video.get(_ORDER) if isinstance(video, dict) else None
        if not isinstance(order, list):
            raise UserError(f"{path}: video {str(name)[:80]!r} has no list {_ORDER}", "download it again")
        missing = [clip for clip in order if not isinstance(clip, str) or clip not in video]
        if missing:
            raise UserError(f"{path}: video {str(name)[:80]!r} lacks {str(missing[0])[:80]!r}", "download it again")
        for clip in dict.fromkeys([*order, *video]):
            if clip == _ORDER:
                continue
            yield {"uid": clip, "video": name, **_record(path, clip, video[clip])}


def _of_clips(path: Path, clips: Any) -> Iterator[dict[str, Any]]:
    if isinstance(clips, dict):
        for name, clip in clips.items():
            yield {"uid": name, **_record(path, name, clip)}
    elif isinstance(clips, list):
        for number, clip in enumerate(clips, 1):
            yield _record(path, number, clip)
    else:
        raise UserError(f"{path} holds one {type(clips).__name__}, not a list of clips", "check data.table (--table)")


def _record(path: Path, name: Any, clip: Any) -> dict[str, Any]:
    if not isinstance(clip, dict):
        raise UserError(
            f"{path}: clip {str(name)[:80]!r} is of type {type(clip).__name__}, not an object with a text",
            "check data.table (--table), and the data set that data.source (--source) names",
        )
    return clip


def _plain(value: Any) -> Any:
    """numpy's numbers, texts and arrays as Python's."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
