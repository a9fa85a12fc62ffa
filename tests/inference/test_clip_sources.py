"""Clips to translate are found by any spelling of their names; missing and ambiguous names are errors."""

from __future__ import annotations

import unicodedata
import zipfile
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.inference.clip_sources import find_clips


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a/x.POSE", "b/x.pose", "b/U\u0308bung.Npy", "b/._y.pose", "b/notes.txt", "c.npy", "c.pose"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).write_bytes(name.encode())
    return tmp_path / "clips"


@pytest.fixture
def archive(folder: Path) -> Path:
    path = folder.parent / "clips.zip"
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(folder.rglob("*")):
            if member.is_file():
                file.write(member, member.relative_to(folder))
    return path


def test_a_folder_and_an_archive_of_it_hold_the_same_clips(folder: Path, archive: Path) -> None:
    uids = [
        sorted(clip.uid.removeprefix(f"{place}").lstrip(":/") for clip in find_clips([str(place)]))
        for place in (folder, archive)
    ]
    assert uids[0] == uids[1] == ["a/x", "b/U\u0308bung", "b/x", "c.npy", "c.pose"]


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("a/x", "a/x.POSE"),
        (".\\a\\x.pose", "a/x.POSE"),
        ("\u00dcbung", "b/U\u0308bung.Npy"),
        ("b/\u00dcbung.NPY", "b/U\u0308bung.Npy"),
        ("/data/clips/b/x.pose", "b/x.pose"),
        ("C:\\clips\\b\\x.pose", "b/x.pose"),
    ],
)
def test_a_member_is_found_by_any_spelling(archive: Path, name: str, member: str) -> None:
    (clip,) = find_clips([f"{archive}:{name}"])
    assert clip.where == f"{archive}:{member}"


def test_a_file_is_found_by_any_spelling(folder: Path) -> None:
    for name in ("b/\u00dcbung.npy", "b/\u00dcbung", "b/U\u0308bung.NPY", "b/U\u0308bung.Npy"):
        (clip,) = find_clips([str(folder / name)])
        assert unicodedata.normalize("NFC", clip.uid) == "\u00dcbung" and clip.where.endswith("bung.Npy")


def test_ambiguous_and_missing_names_are_errors_with_a_remedy(folder: Path, archive: Path) -> None:
    for name in (f"{archive}:x", f"{archive}:c", str(folder / "c")):
        with pytest.raises(UserError) as raised:
            find_clips([name])
        candidates = raised.value.hint.rpartition("one of ")[2].split(", ")
        assert len(candidates) == 2
        for file in candidates:
            place = f"{archive}:{file}" if ":" in name else str(folder / file)
            assert [clip.where for clip in find_clips([place])] == [place], "the remedy works"
    with pytest.raises(UserError, match=r"clips\.zip.* y\.pose") as raised:
        find_clips([f"{archive}:y.pose"])
    assert raised.value.hint.lower().endswith((".pose", ".npy"))
    with pytest.raises(UserError, match=r"d\.pose") as raised:
        find_clips([str(folder / "d.pose")])
    assert raised.value.hint.endswith("clips/c.pose")
    for name in ("/nowhere/d.pose", "x" * 250 + "/d.pose", "/" + "x" * 260 + "/d.pose", "/nowhere/a.zip:" + "y" * 270):
        with pytest.raises(UserError) as raised:
            find_clips([name])
        assert raised.value.message.endswith(name)
