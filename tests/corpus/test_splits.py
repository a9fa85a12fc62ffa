import random

import pytest

from toolkit.corpus.splits import assign_splits, leakage, normalised_text, remove_shared_texts, source_video
from toolkit.corpus.table import Row
from toolkit.errors import UserError


@pytest.mark.parametrize(
    ("uid", "video"),
    [
        ("1782bea75c7d-7", "1782bea75c7d"),
        ("dQw4w9WgXcQ--77", "dQw4w9WgXcQ"),
        ("-_w4w9Wg-c_--7", "-_w4w9Wg-c_"),
        ("dQw4w9WgXcQ_w", "dQw4w9WgXcQ"),
        ("dQw4w9WgXcQ_d", "dQw4w9WgXcQ"),
        ("dQw4w9WgXcQ_e12", "dQw4w9WgXcQ"),
        ("clip-7", "clip-7"),
        ("train-00012", "train-00012"),
    ],
)
def test_the_video_of_a_uid(uid: str, video: str) -> None:
    assert source_video(Row(uid, "x")) == video


def test_the_column_video_overrules_the_uid() -> None:
    assert source_video(Row("1782bea75c7d-7", "x", video="v")) == "v"


def _rows(videos: int, clips: int) -> list[Row]:
    return [Row(f"{video:012x}-{clip}", f"{video} {clip}") for video in range(videos) for clip in range(clips)]


def test_no_video_is_in_two_splits_and_shares_are_met() -> None:
    splits = assign_splits(_rows(200, 5), 0.05, 0.10, seed=0)
    assert list(splits) == ["train", "dev", "test"]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 850, "dev": 50, "test": 100}
    videos = [{source_video(row) for row in rows} for rows in splits.values()]
    assert sum(map(len, videos)) == 200 == len(set.union(*videos))
    assert all(value == 0 for value in leakage(splits).values())


def test_the_order_of_the_table_does_not_matter_but_the_seed_does() -> None:
    rows = _rows(50, 3)
    shuffled = random.Random(0).sample(rows, len(rows))
    members = [
        {row.uid for row in assign_splits(table, 0.1, 0.1, seed)["test"]}
        for table, seed in ((rows, 0), (shuffled, 0), (rows, 1))
    ]
    assert members[0] == members[1] != members[2]


def _signed(signers: int, clips: int) -> list[Row]:
    return [
        Row(f"{signer}-{clip}", f"{signer} {clip}", video=f"v{clip}", split="train", signer=f"s{signer}")
        for signer in range(signers)
        for clip in range(clips)
    ]


def test_no_signer_is_in_two_splits_whatever_the_table_says() -> None:
    rows = _signed(20, 6)
    assert list(assign_splits(rows, 0.1, 0.1, 0)) == ["train"]
    splits = assign_splits(rows, 0.1, 0.1, 0, by="signer")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 96, "dev": 12, "test": 12}
    assert sum(len({row.signer for row in rows}) for rows in splits.values()) == 20
    found = leakage(splits)
    assert found["test_signers_in_train"] == found["dev_signers_in_train"] == 0
    assert found["test_videos_in_train"] == 12
    by_video = assign_splits(rows, 0.1, 0.1, 0, by="video")
    assert leakage(by_video)["test_videos_in_train"] == 0
    assert leakage(by_video)["test_signers_in_train"] == len(by_video["test"]) > 0


def test_leakage_of_signers_is_counted_where_the_table_names_some() -> None:
    rows = {"train": [Row("a", "x", signer="s"), Row("b", "y")], "test": [Row("c", "z", signer="s"), Row("d", "w")]}
    assert leakage(rows)["test_signers_in_train"] == 1
    assert "test_signers_in_train" not in leakage(_with_texts(train=["a"], test=["b"]))


def test_splits_by_signer_need_a_signer_in_every_row_and_enough_of_them() -> None:
    rows = [*_signed(3, 2), Row("x", "y", line=7)]
    with pytest.raises(UserError, match="line 7") as raised:
        assign_splits(rows, 0.1, 0.1, 0, by="signer")
    assert "--columns signer=" in raised.value.hint
    with pytest.raises(UserError, match="2 signers"):
        assign_splits(_signed(2, 9), 0.1, 0.1, 0, by="signer")


def _with_texts(**texts: list[str]) -> dict[str, list[Row]]:
    return {
        name: [Row(f"{name}-{number}", text, line=number) for number, text in enumerate(of_split)]
        for name, of_split in texts.items()
    }


@pytest.mark.parametrize(
    ("policy", "kept", "reasons"),
    [
        ("keep", 4, []),
        ("remove", 3, ["train has its text"]),
        ("remove_near", 2, ["train has its text", "train has nearly its text"]),
    ],
)
def test_held_out_texts_that_train_has_are_removed_when_asked(policy, kept, reasons) -> None:
    splits = _with_texts(
        train=["Where is my red book?", "Good morning."],
        test=["where is my  red book", "where is my green red book", "Good evening.", "a b c d"],
    )
    left, removed = remove_shared_texts(splits, policy)
    assert left["train"] == splits["train"] and len(left["test"]) == kept
    assert [reason for _, _, reason in removed] == reasons
    counts = leakage(left)
    if policy == "remove_near":
        assert not any(counts.values())
    assert counts["test_texts_in_train"] == (policy == "keep")


def test_removal_may_not_empty_a_split() -> None:
    with pytest.raises(UserError, match=r"data\.shared_texts=remove .*'dev'"):
        remove_shared_texts(_with_texts(train=["yes"], dev=["Yes!"], test=["no"]), "remove")


def test_splits_as_given() -> None:
    rows = [Row("a", "x", split="test"), Row("b", "x", split="train"), Row("c", "y", split="zz")]
    splits = assign_splits(rows, 0.5, 0.5, seed=0)
    assert {name: [row.uid for row in rows] for name, rows in splits.items()} == {
        "train": ["b"],
        "test": ["a"],
        "zz": ["c"],
    }
    assert list(splits) == ["train", "test", "zz"]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([Row("a", "x", split="train", line=2), Row("b", "x", line=3)], r"t\.csv, line 3 .*\(1 such rows\)"),
        (_rows(2, 5), r"t\.csv: .*10 clips .*\b2\b"),
    ],
)
def test_splits_that_are_impossible(rows: list[Row], named: str) -> None:
    with pytest.raises(UserError, match=named):
        assign_splits(rows, 0.1, 0.1, seed=0, table="t.csv")


def test_few_videos_still_fill_every_split() -> None:
    assert {name: len(rows) for name, rows in assign_splits(_rows(3, 4), 0.05, 0.05, 0).items()} == {
        "train": 4,
        "dev": 4,
        "test": 4,
    }


def test_leakage_is_counted() -> None:
    splits = {
        "train": [Row("1", "Hello, World!", video="v"), Row("5", "we walk to the river today", video="u")],
        "test": [
            Row("2", "hello world", video="w"),
            Row("3", "hello you", video="v"),
            Row("4", "Today we walk to a river.", video="x"),
            Row("6", "we walk to the river", video="y"),
            Row("7", "they run to the river now", video="z"),
        ],
    }
    assert leakage(splits) == {"test_texts_in_train": 1, "test_near_texts_in_train": 2, "test_videos_in_train": 1}


def test_normalised_text_keeps_other_scripts() -> None:
    assert normalised_text("  नमस्ते, दुनिया! ") == "नमस्ते दुनिया"
    assert normalised_text("你好。") == "你好"
    assert normalised_text("?!") == ""
