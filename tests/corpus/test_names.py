import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.corpus.names import LONGEST_PRINTED, Names, canonical, contradict, escaped, is_pose_file, shared_tail

_PARTS = st.text("abÜéक्षñ%_- .0", min_size=1, max_size=5).map(str.strip).filter(lambda part: part.strip("."))
_STEMS = _PARTS.filter(lambda part: not part.startswith("._"))
_FILES = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem + suffix]),
    st.lists(_PARTS, max_size=3),
    _STEMS,
    st.sampled_from([".pose", ".POSE", ".npy", ".Npz", ".pkl", ".pose.npy"]),
)
_SPELLINGS = [
    lambda name: name,
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: "./" + name,
    lambda name: name.replace("/", "\\"),
    lambda name: ".\\" + name.replace("/", "//./"),
    lambda name: name[: -len(name.rpartition(".")[2])] + name.rpartition(".")[2].swapcase(),
]
_SPELLING = st.lists(st.sampled_from(_SPELLINGS), max_size=3)
_PREFIXES = st.sampled_from(
    ["/mnt/elsewhere/", "C:\\Users\\me\\", "c:/", "file:///mnt/", "~/", "../../up/", "\\\\host\\share\\"]
)
_fast = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _spelled(name: str, spelling: list) -> str:
    for change in spelling:
        name = change(name)
    return name


@_fast
@given(st.lists(_FILES, min_size=1, max_size=8, unique=True), st.data())
def test_a_path_finds_its_file_however_it_is_spelled(files: list[str], data) -> None:
    """From the top of the folder, in any spelling: that file, unless another one is spelled alike."""
    there = [_spelled(file, data.draw(_SPELLING)) for file in files]
    index, wanted = data.draw(st.sampled_from(list(enumerate(files))))
    found = Names(there).match(_spelled(wanted, data.draw(_SPELLING)))
    assert there[index] in found or len(found) == 1
    assert {canonical(file) for file in found} == {canonical(wanted)}
    if sum(canonical(file) == canonical(wanted) for file in files) == 1:
        assert found == [there[index]]


@_fast
@given(st.lists(_FILES, min_size=1, max_size=8, unique_by=canonical), _PREFIXES, st.data())
def test_more_folders_or_fewer_mean_the_file_where_it_is_the_only_one(files: list[str], prefix: str, data) -> None:
    wanted = data.draw(st.sampled_from(files))
    stem = canonical(wanted).rpartition("/")[2]
    alone = sum(canonical(file).rpartition("/")[2] == stem for file in files) == 1
    names = Names(files)
    for name in (prefix + wanted, prefix + _spelled(wanted, data.draw(_SPELLING))):
        assert names.match(name) == [wanted] if alone else wanted in names.match(name), name
    assert names.match(stem) == [wanted] if alone else names.match(stem)


@_fast
@given(st.lists(_FILES, min_size=2, max_size=8, unique=True), _FILES)
def test_the_remedy_for_an_ambiguous_name_works(files: list[str], name: str) -> None:
    """Each file that the message lists is found by what it lists."""
    names = Names(files)
    for looked_up in (name, *(canonical(file).rpartition("/")[2] for file in files)):
        matches = names.match(looked_up)
        assert set(matches) <= set(files)
        for file in matches:
            assert names.match(file) == [file]


@_fast
@given(st.lists(_FILES, min_size=1, max_size=8, unique=True), st.text(max_size=20))
def test_what_is_not_there_has_a_nearest_that_is(files: list[str], name: str) -> None:
    names = Names(files)
    near = names.nearest(name)
    assert near in files and near in names.match(near)
    assert "\n" not in escaped(name)


def test_folders_that_are_there_are_not_passed_over() -> None:
    names = Names(["train/7.pose", "train/8.pose", "test/8.pose", "test/9.pose"])
    assert names.match("/data/test/7.pose") == names.match("test/7") == names.match("other/7") == []
    assert names.match("/data/other/7.pose") == names.match("7") == ["train/7.pose"]
    assert names.match("/data/test/8.pose") == ["test/8.pose"]
    assert names.match("/data/8.pose") == names.match("8") == ["train/8.pose", "test/8.pose"]
    assert names.match("/data/train/monday/7.pose") == names.match("train/monday/7") == []
    assert Names(["poses/train/7.pose"]).match("corpus/train/7.pose") == ["poses/train/7.pose"]


def test_a_path_below_the_folder_is_the_file_that_lies_there() -> None:
    names = Names(["7.pose", "poses/7.pose"], root="/data/poses")
    assert names.match("/data/poses/7.pose") == ["7.pose"]
    assert names.match("/data/poses/poses/7.pose") == ["poses/7.pose"]


def test_suffix_and_spelling_decide_between_files_of_one_name() -> None:
    nfc, nfd = "\u00e9.pose", "e\u0301.pose"
    names = Names(["a.npy", "a.pose", "b.pose", "b.POSE", nfc, nfd, "c.npy.pose"])
    assert names.match("a") == ["a.npy", "a.pose"] and names.match("a.NPY") == ["a.npy"]
    assert names.match("b") == ["b.pose", "b.POSE"] and names.match("b.POSE") == ["b.POSE"]
    assert names.match("\u00e9") == [nfc] and names.match(nfd) == [nfd]
    assert names.match("c") == names.match("c.npy") == ["c.npy.pose"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("S00", "s00.pose"), ("s0", "s00.pose"), ("train_s01", "a/s01.pose"), ("zebra", "a/zebre.pose"), ("", None)],
)
def test_the_nearest_name(name: str, near: str | None) -> None:
    names = Names(["s00.pose", "a/s01.pose", "a/zebre.pose", "m.pose"])
    assert names.match(name) == [] and names.nearest(name) in (names.names if near is None else [near])


def test_names_of_poses() -> None:
    assert all(map(is_pose_file, ["x.pose", "a/x.POSE", "x.Npy", "x.pose.npz", "a\\x.pkl"]))
    assert not any(map(is_pose_file, ["x.txt", "pose", "__MACOSX/a/._x.pose", "._x.pose", "a\\._x.pose"]))


def test_contradictions() -> None:
    assert contradict("/data/train/7.pose", "/data/test/7.pose") and contradict("7", "8")
    assert not contradict("7.pose", "test/7") and not contradict("test\\7", "./test/7.POSE")
    assert shared_tail("/data/test/7.pose", "x/test/7") == 2 and shared_tail("7", "8") == 0


def test_names_are_shown_on_one_line_and_not_for_ever() -> None:
    assert escaped("a\nb\x1b[1m\udcff\u00a0") == "a\\nb\\x1b[1m\\udcff\\xa0"
    assert len(escaped("x" * 10_000)) <= LONGEST_PRINTED + 3


def test_one_file_name_in_a_folder_for_each_clip_costs_no_search() -> None:
    """A hundred thousand lookups in lists of a hundred thousand would not end."""
    names = Names([f"poses/clip{number}/keypoints.npy" for number in range(20_000)])
    looked = [names.match(f"/data/clip{number}/keypoints.npy") for number in range(20_000)]
    assert all(len(found) == 1 for found in looked)
    assert all(names.match(f"gone{number}/keypoints.npy") == [] for number in range(20_000))
