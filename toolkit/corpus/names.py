"""Match the names of clips in tables and commands with files, archive members and clips.

Names are compared by their folders and stem: in NFC, with or without a suffix of pose files or videos in any case, with
``/`` or ``\\``, with ``:`` or ``%``, without ``./``. A name may lack folders on the left or have more of them, as an
absolute path of another machine has.
"""

from __future__ import annotations

import bisect
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from operator import eq

from toolkit.poses.video import VIDEO_SUFFIXES

SUFFIXES = (".pose", ".npy", ".npz", ".pkl")
FEATURE_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".safetensors")
"""Of pose files, and of files with what another network made of a video."""

_ALL_SUFFIXES = tuple(dict.fromkeys((*SUFFIXES, *FEATURE_SUFFIXES)))
_DROPPED = (*_ALL_SUFFIXES, *VIDEO_SUFFIXES)  # tables name the video, and tools name the poses after it: x.mp4.pose

MOST_MATCHES = 8  # files that a message about an ambiguous name lists
LONGEST_PRINTED = 300  # characters of a name in a message

# file:///data/x, s3://bucket/x, C:/data/x, ~/x
_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z]:(?=/)|~(?=/)")


def is_pose_file(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a name has one of the suffixes; the metadata files (``._x.pose``) that macOS adds to archives do not."""
    return name.lower().endswith(suffixes) and not posixpath.basename(name.replace("\\", "/")).startswith("._")


def canonical(name: str) -> str:
    """The form in which names are compared: folders and stem, joined by ``/``."""
    return _parse(name)[1]


def contradict(first: str, second: str) -> bool:
    """Whether two names cannot mean the same file: neither is the other with more folders to the left."""
    return not (_ends_with(first, second) or _ends_with(second, first))


def shared_tail(first: str, second: str) -> int:
    """How many parts of two names are the same, counted from the right."""
    return _common(canonical(first).split("/")[::-1], canonical(second).split("/")[::-1])


def escaped(name: str) -> str:
    """A name for a message: on one line, without control characters, and shortened if it is very long."""
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
    half = LONGEST_PRINTED // 2
    return name if len(name) <= LONGEST_PRINTED else f"{name[:half]}...{name[-half:]}"


def one_line(text: str) -> str:
    """A text on one line, with spaces for control characters."""
    return "".join(character if character.isprintable() else " " for character in text)


class Names:
    """An index of names that finds those which a table or user may mean."""

    def __init__(self, names: Iterable[str], root: str = "") -> None:
        """Index names of clips, or of files or members; a path below ``root`` means exactly that file."""
        self.names = list(names)
        self._root = canonical(root) + "/" if root else ""
        self._by_path: dict[str, list[str]] = {}
        # By stem, anywhere ("") and within each of the folders above it. A corpus may use one file name in a folder for
        # each clip (clip17/keypoints.npy), so a search through all files of one stem would be too slow.
        self._within: dict[tuple[str, str], list[str]] = {}
        self._folders: set[str] = set()
        for name in self.names:
            path = canonical(name)
            *folders, stem = path.split("/")
            self._by_path.setdefault(path, []).append(name)
            for folder in ("", *set(folders)):
                self._within.setdefault((folder, stem), []).append(name)
            self._folders.update(folders)

    def match(self, name: str) -> list[str]:
        """The names that match: one, none, or several (at most ``MOST_MATCHES``) if the name is ambiguous.

        A whole path matches itself alone. Otherwise folders may be missing on either side, but a folder that exists
        must match: ``/data/test/7`` does not match ``train/7`` if there is a folder ``test``, and
        ``/data/train/monday/7`` does not match ``train/tuesday/7``.
        """
        absolute, path = self._locate(name)
        if path in self._by_path:
            return _narrow(name, self._by_path[path])
        *folders, stem = path.split("/")
        known = [folder for folder in folders if folder in self._folders]
        if known:
            foreign_below = folders[-len(known) :] != known
            candidates = [] if foreign_below else self._within.get((known[-1], stem), [])
        elif folders and not absolute:
            candidates = self._by_path.get(stem, [])
        else:
            candidates = self._within.get(("", stem), [])
        found: list[str] = []
        for candidate in candidates:
            there = canonical(candidate)
            more = absolute or known or f"/{path}".endswith(f"/{there}")
            if f"/{there}".endswith(f"/{path}") or (more and set(known) <= set(there.split("/")[:-1])):
                found.append(candidate)
                if len(found) == MOST_MATCHES:
                    break
        return _narrow(name, found)

    def nearest(self, name: str) -> str:
        """The most similar name of the index: the one with the longest common beginning and end, in any case."""
        path = self._locate(name)[1].casefold()
        around: set[str] = set()
        for key, (spelled, names) in zip((path, path[::-1], posixpath.basename(path)), self._sorted, strict=True):
            place = bisect.bisect(spelled, key)
            around.update(names[max(place - 2, 0) : place + 2])
        return max(
            sorted(around),
            key=lambda near: (_similarity(path, canonical(near).casefold()), _suffix(near) == _suffix(name)),
            default="",
        )

    @cached_property
    def _sorted(self) -> list[tuple[list[str], list[str]]]:
        """Sorted keys and their names: by path, by reversed path, and by stem."""
        paths = [canonical(name).casefold() for name in self.names]
        orders = []
        for spelled in (paths, [path[::-1] for path in paths], [posixpath.basename(path) for path in paths]):
            pairs = sorted(zip(spelled, self.names, strict=True))
            orders.append(([key for key, _ in pairs], [name for _, name in pairs]))
        return orders

    def _locate(self, name: str) -> tuple[bool, str]:
        absolute, path = _parse(name)
        return absolute, path.removeprefix(self._root) if absolute and self._root else path


def _parse(name: str) -> tuple[bool, str]:
    """Whether a name is absolute or begins above the folder it is looked up in, and its canonical form."""
    name = name.replace("\\", "/")
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    rest = _ROOT.sub("", name, count=1) if _ROOT.match(name) else name
    absolute = rest != name or rest.startswith("/")
    rest = rest.replace(":", "%")  # no file of Windows has it, and OpenASL writes its clips so
    parts: list[str] = []
    for part in map(str.strip, rest.split("/")):
        if part == ".." and parts:
            parts.pop()
        elif part == "..":
            absolute = True
        elif part not in ("", "."):
            parts.append(part)
    if parts:
        parts[-1] = _without_suffix(parts[-1])
    return absolute, "/".join(parts)


def _without_suffix(name: str, dropped: Sequence[str] = _DROPPED) -> str:
    while True:
        stem, dot, suffix = name.rpartition(".")
        if not stem or dot + suffix.lower() not in dropped:
            return name.rstrip()
        name = stem


def _suffix(name: str) -> str:
    """The suffix of a pose or feature file that a name has, "" if it has none."""
    return next((suffix for suffix in _ALL_SUFFIXES if name.lower().endswith(suffix)), "")


def _narrow(name: str, found: Sequence[str]) -> list[str]:
    """Of files that differ in suffix or spelling alone, those that are spelled as the name is, if there are any.

    One folder may hold ``x.npy`` and ``x.pose``, or two forms of ``é``.
    """
    spellings: list[Callable[[str], str]] = [_suffix]
    if len({canonical(candidate) for candidate in found}) == 1:
        spellings += [posixpath.normpath, posixpath.basename]
        spellings += [lambda name: _without_suffix(posixpath.basename(name), _ALL_SUFFIXES)]
    for spelling in spellings:
        found = [candidate for candidate in found if spelling(candidate) == spelling(name)] or found
    return list(found)


def _ends_with(name: str, end: str) -> bool:
    return f"/{canonical(name)}".endswith(f"/{canonical(end)}")


def _similarity(first: str, second: str) -> tuple[int, int]:
    stems = [posixpath.basename(name) for name in (first, second)]
    same = _common(first, second) + _common(first[::-1], second[::-1]) + _common(*stems)
    return same, -abs(len(stems[0]) - len(stems[1]))


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many elements are the same from the first on."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))
