import io
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from toolkit.corpus.archives.files import open_poses
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import prepare
from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.poses.pose_file import PoseError
from toolkit.recipe.schema import Data


def _zip(poses: Path, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(poses.iterdir()):
            archive.write(file, f"iSign-poses/{file.name}")
    return path


def _tar(poses: Path, path: Path, top: str = "poses") -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(poses, top)
    return path


def _split(path: Path, parts: int, names: str) -> Path:
    content = path.read_bytes()
    path.unlink()
    size = -(-len(content) // parts)
    for number in range(parts):
        name = f"{path.name}.part_a{'abcdef'[number]}" if names == "letters" else f"{path.name}.{number + 1:03d}"
        path.with_name(name).write_bytes(content[number * size : (number + 1) * size])
    return path.with_name(f"{path.name}.part_ab" if names == "letters" else f"{path.name}.001")


@pytest.fixture(scope="module")
def from_folder(clips, tmp_path_factory) -> dict[str, bytes]:
    return _corpus(clips, clips / "poses", tmp_path_factory.mktemp("folder"), workers=1)


def _corpus(clips: Path, poses: Path, tmp_path: Path, workers: int) -> dict[str, bytes]:
    data = Data(table=str(clips / "table.csv"), poses=str(poses), workers=workers)
    out = prepare(data, tmp_path / "out").path
    assert Corpus.open(out).summary()["clips"] == 24
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "parts"])
def test_another_process_opens_the_same_archive(clips, tmp_path, form, monkeypatch) -> None:
    """A builder on another machine may stand in another folder."""
    poses = clips / "poses"
    if form == "parts":
        poses = _split(_zip(poses, tmp_path / "p.zip"), 3, "letters")
    elif form != "folder":
        poses = {"zip": _zip, "tar": _tar}[form](poses, tmp_path / f"p.{form}")
    monkeypatch.chdir(poses.parent)
    here = open_poses(Path(poses.name))
    sent = pickle.dumps(here)
    monkeypatch.chdir("/")
    there = pickle.loads(sent)
    row = Row("train-00003", "")
    assert there.read(there.find(row)) == (clips / "poses" / "train-00003.pose").read_bytes()


def test_links_in_circles_are_followed_once(clips, tmp_path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "x.pose").symlink_to(clips / "poses" / "train-00000.pose")
    (tmp_path / "a" / "gone.pose").symlink_to(tmp_path / "nowhere")
    assert sorted(open_poses(tmp_path / "a").files) == ["b/x.pose"]


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "form",
    [
        "zip",
        "deflated",
        "tar",
        "tar of ./",
        "three parts of a zip",
        "numbered parts of a zip",
        "parts of a tar",
        "parts by their stem",
    ],
)
def test_byte_identical_from_everywhere(clips, tmp_path, monkeypatch, from_folder, form: str, workers: int) -> None:
    poses = clips / "poses"
    if form == "zip":
        where = _zip(poses, tmp_path / "p.zip")
    elif form == "deflated":
        where = _zip(poses, tmp_path / "p.zip", zipfile.ZIP_DEFLATED)
    elif form == "tar":
        where = _tar(poses, tmp_path / "p.tar")
    elif form == "tar of ./":
        where = _tar(poses, tmp_path / "p.tar", ".")
    elif form == "parts of a tar":
        where = _split(_tar(poses, tmp_path / "p.tar"), 3, "letters")
    elif form == "numbered parts of a zip":
        where = _split(_zip(poses, tmp_path / "p.zip"), 3, "digits")
    else:
        where = _split(_zip(poses, tmp_path / "p.zip"), 3, "letters")
        where = tmp_path / "p.zip" if form == "parts by their stem" else where
    assert _corpus(clips, where, tmp_path, workers) == from_folder


def test_a_missing_part_is_named(clips, tmp_path) -> None:
    part = _split(_zip(clips / "poses", tmp_path / "p.zip"), 3, "letters")
    shutil.move(part, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="number 2"):
        open_poses(tmp_path / "p.zip.part_aa")
    shutil.move(tmp_path / "elsewhere", part)
    (tmp_path / "p.zip.part_ac").unlink()
    with pytest.raises(UserError, match=r"2 parts .*p\.zip"):
        open_poses(tmp_path / "p.zip.part_aa")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + b"\xff" * 40, b"\x1f\x8b" + b"0" * 100])
def test_a_file_that_is_no_archive_is_named(tmp_path, content: bytes) -> None:
    (tmp_path / "p.zip").write_bytes(content)
    with pytest.raises(UserError) as raised:
        open_poses(tmp_path / "p.zip")
    assert "p.zip" in raised.value.message and raised.value.hint


def test_an_archive_without_poses(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(UserError, match=r"p\.zip .*\.pose, "):
        open_poses(tmp_path / "p.zip")


def test_members_with_absolute_or_parent_paths_are_not_unpacked(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("../../evil.pose", "x")
        archive.writestr("/etc/passwd.pose", "y")
    poses = open_poses(tmp_path / "p.zip")
    assert poses.read(poses.find(Row("evil", "t"))) == b"x"
    assert list(tmp_path.parent.rglob("evil.pose")) == [], "nothing is ever unpacked"


def test_a_damaged_member_is_its_own_reject(clips, tmp_path) -> None:
    path = _zip(clips / "poses", tmp_path / "p.zip")
    content = bytearray(path.read_bytes())
    content[5000] ^= 0xFF
    path.write_bytes(content)
    poses = open_poses(path)
    first, second = sorted(file.stem for file in (clips / "poses").iterdir())[:2]
    with pytest.raises(PoseError, match="Bad CRC"):
        poses.read(poses.find(Row(first, "t")))
    assert poses.read(poses.find(Row(second, "t"))) == (clips / "poses" / f"{second}.pose").read_bytes()


@pytest.mark.parametrize("form", ["zip", "deflated", "tar"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_archive_is_an_error_or_rejects_its_clips(clips, tmp_path, form: str, share: float) -> None:
    """A download that broke off."""
    method = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
    poses = clips / "poses"
    path = _tar(poses, tmp_path / "p.tar") if form == "tar" else _zip(poses, tmp_path / "p.zip", method)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    try:
        found = open_poses(path)
    except UserError as error:
        assert path.name in error.message and error.hint
        return
    with pytest.raises(PoseError, match=r"tar|zip"):
        [found.read(key) for key in found.files.values()]


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        link = tarfile.TarInfo("link.pose")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        plain = tarfile.TarInfo("plain.pose")
        plain.size = 4
        archive.addfile(plain, io.BytesIO(struct.pack("<f", 0.2)))
    poses = open_poses(tmp_path / "p.tar")
    assert poses.find(Row("link", "t")) is None and len(poses.read(poses.find(Row("plain", "t")))) == 4


def test_two_files_of_one_name_are_distinguished_by_their_folders(tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.pose").write_text(folder)
    poses = open_poses(tmp_path)
    assert poses.find(Row("x", "t")) is None
    assert poses.read(poses.find(Row("b/x", "t"))) == b"b"
    assert poses.read(poses.find(Row("u", "t", pose="a/x.pose"))) == b"a"
    assert poses.reason_not_found(Row("x", "t")) == (
        "several pose files have its name: 'x' may be a/x.pose or b/x.pose",
        "write the path of the right one as the uid or into a column pose",
    )


_FORMS = ["folder", "zip", "tar"]


def _hold(form: str, members: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder, zip or tar with these members under these very names."""
    path = tmp_path / f"p.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    elif form == "tar":
        with tarfile.open(path, "w") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize(
    "looked_up",
    [
        Row("\u00dcbung", "t"),
        Row("U\u0308bung", "t"),
        Row("\u00dcbung.pose", "t"),
        Row("day 1\\\u00dcbung.Pose", "t"),
        Row("u", "t", pose="D:\\poses\\day 1\\\u00dcbung.pose"),
        Row("u", "t", pose="/mnt/elsewhere/\u00dcbung.pose"),
        Row("excerpt", "t", video="./day 1/U\u0308bung.POSE", start=0.0),
    ],
    ids=lambda row: row.pose or row.video or row.uid,
)
def test_one_name_is_found_in_every_place(tmp_path, form: str, looked_up: Row) -> None:
    members = {"./day 1/U\u0308bung.POSE": b"it", "./day 1/\u00dcbung2.pose": b"other", "./day 1/._x.pose": b"no pose"}
    poses = open_poses(_hold(form, members, tmp_path))
    assert len(poses.files) == 2 and poses.read(poses.find(looked_up)) == b"it"


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize(
    "stem", ["50 %", "100%25", "a b  c", "x" * 240, "-rf", "~", "a.b.c", "o'clock\"", "\U0001f44b"]
)
def test_unusual_names_are_names(tmp_path, form: str, stem: str) -> None:
    poses = open_poses(_hold(form, {f"{stem}.pose": b"it", "b.pose": b"other"}, tmp_path))
    assert [poses.read(poses.find(Row(name, "t"))) for name in (stem, f"/data/{stem}.pose")] == [b"it", b"it"]
    reason, _ = poses.reason_not_found(Row(f"{stem}_", "t"))
    assert f"looked up '{stem}_' (uid), the nearest is {stem}.pose" in reason and "\n" not in reason


def test_members_of_a_windows_archive(tmp_path) -> None:
    poses = open_poses(_hold("zip", {"train\\x.pose": b"train", "test\\x.pose": b"test"}, tmp_path))
    assert [poses.read(poses.find(Row(f"{name}/x", "t"))) for name in ("train", "test")] == [b"train", b"test"]
    assert poses.find(Row("x", "t")) is None


def test_a_zip_whose_names_are_utf8_and_do_not_say_so(tmp_path) -> None:
    """As the Finder of macOS writes it."""
    path = _hold("zip", {"U\u0308bung.pose": b"it"}, tmp_path)
    content = path.read_bytes()
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(signature) + flags
        assert content[place + 1] & 0x08, "zipfile marks it"
        content = content[: place + 1] + bytes([content[place + 1] & ~0x08]) + content[place + 2 :]
    path.write_bytes(content)
    poses = open_poses(path)
    assert list(poses.files) == ["U\u0308bung.pose"] and poses.read(poses.find(Row("\u00dcbung", "t"))) == b"it"


def test_of_a_member_that_a_tar_holds_twice_the_later_one_counts(tmp_path) -> None:
    path = _hold("tar", {"./x.pose": b"old", "x.pose": b"new"}, tmp_path)
    poses = open_poses(path)
    assert poses.read(poses.find(Row("x", "t"))) == b"new"


def test_a_pose_column_is_the_only_name_looked_up(tmp_path) -> None:
    """Another file that has the uid's name may be another clip."""
    poses = open_poses(_hold("folder", {"u.pose": b"another", "w1.pose": b"another"}, tmp_path))
    row = Row("u", "t", pose="w.pose")
    assert (
        poses.find(row) is None
        and "looked up 'w.pose' (pose), the nearest is w1.pose" in poses.reason_not_found(row)[0]
    )


def test_names_that_are_not_utf8_can_be_printed(tmp_path) -> None:
    (tmp_path / "p").mkdir()
    with open(bytes(tmp_path / "p") + b"/\xdcbung.pose", "wb"):
        pass
    poses = open_poses(tmp_path / "p")
    reason, _ = poses.reason_not_found(Row("\u00dcbung", "t"))
    assert "the nearest is \\udcdcbung.pose" in reason and reason.encode("utf-8")


def test_a_member_whose_header_holds_no_name_is_a_reject(tmp_path: Path) -> None:
    path = tmp_path / "poses.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.pose", b"pose")
    content = bytearray(path.read_bytes())
    content[7] |= 0x08  # of the member's own header: its name is UTF-8
    content[30] = 0xFF  # which no such name begins with
    path.write_bytes(content)
    poses = open_poses(path)
    with pytest.raises(PoseError):
        poses.read(poses.files["a.pose"])
