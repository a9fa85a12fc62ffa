import csv
import re
from itertools import combinations

import numpy as np
import pytest

from toolkit.corpus.demo import (
    MAIN_LANGUAGE,
    NOISE,
    OTHER_LANGUAGES,
    UNSEEN_LANGUAGES,
    DemoSizes,
    Phrase,
    find_lexicon,
    load_letters,
    make_demo,
    phrases,
    split_words,
    synthesise,
    words,
)
from toolkit.errors import UserError
from toolkit.poses.pose_file import read_pose

SIZES = DemoSizes(train=12, dev=2, test=4, test_unseen_languages=4)


def test_the_word_list() -> None:
    listed = words()
    assert len(listed) >= 1600 and listed == sorted(set(listed))
    assert all(re.fullmatch("[a-z]{2,8}", word) for word in listed)
    counts = {letter: sum(letter in word for word in listed) for letter in "abcdefghijklmnopqrstuvwxyz"}
    assert min(counts.values()) >= 50, counts


def test_no_word_is_in_two_splits() -> None:
    vocabulary = split_words(0)
    assert sorted(word for dealt in vocabulary.values() for word in dealt) == words()
    made = phrases(DemoSizes(), 0)
    used = {split: set() for split in ("train", "dev", "test", "test_unseen_languages")}
    for phrase in made:
        used[phrase.split] |= set(phrase.text.split())
    for one, other in combinations(("train", "dev", "test"), 2):
        assert not used[one] & used[other]
    assert not used["test_unseen_languages"] & (used["train"] | used["dev"])


def test_phrases_have_one_to_three_words_and_the_languages_of_their_split() -> None:
    made = phrases(DemoSizes(), 0)
    assert len(made) == 4580 and len({phrase.uid for phrase in made}) == 4580
    assert {len(phrase.text.split()) for phrase in made} == {1, 2, 3}
    languages = {split: {phrase.language for phrase in made if phrase.split == split} for split in ("train", "test")}
    assert languages == {"train": {MAIN_LANGUAGE, *OTHER_LANGUAGES}, "test": {MAIN_LANGUAGE}}
    unseen = {phrase.language for phrase in made if phrase.split == "test_unseen_languages"}
    assert unseen == set(UNSEEN_LANGUAGES) and not unseen & languages["train"] and "fsl" not in unseen
    share = np.mean([phrase.language == MAIN_LANGUAGE for phrase in made if phrase.split == "train"])
    assert 0.45 < share < 0.55


@pytest.mark.process
def test_the_seed_decides_every_byte_whatever_the_workers(tmp_path) -> None:
    folders = [
        make_demo(tmp_path / "one", SIZES),
        make_demo(tmp_path / "two", SIZES, workers=2),
        make_demo(tmp_path / "other", SIZES, seed=1),
    ]
    contents = [{file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()} for folder in folders]
    assert contents[0] == contents[1] != contents[2]
    assert len(contents[0]) == 23 and sorted(tmp_path.iterdir()) == sorted(folders)


def test_clips_are_ordinary_pose_files(tmp_path) -> None:
    from pose_format import Pose

    folder = make_demo(tmp_path / "demo", SIZES)
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["uid", "text", "split", "language"]
    content = (folder / "poses" / f"{rows[0]['uid']}.pose").read_bytes()
    pose = Pose.read(content)
    assert round(pose.header.version, 1) == 0.2 and pose.body.fps == 25
    assert [(component.name, len(component.points)) for component in pose.header.components] == [
        ("POSE_LANDMARKS", 33),
        ("LEFT_HAND_LANDMARKS", 21),
        ("RIGHT_HAND_LANDMARKS", 21),
    ]
    raw = read_pose(content)
    missing = raw.confidence == 0
    assert missing.any() and (raw.data[missing] == 0).all() and np.isfinite(raw.data).all()


def test_synthesis_keeps_missing_hands_missing_and_adds_the_stated_noise() -> None:
    letters = load_letters(find_lexicon(), "ase")
    values, confidence = synthesise(Phrase("u", "cab dog", "train", "ase"), letters, 0)
    left, right = confidence[:, 33:54], confidence[:, 54:75]
    assert (left == 0).all() and (right == 1).all()
    assert (values[:, 33:54] == 0).all()
    width = np.median(np.abs(values[:, 11, 0] - values[:, 12, 0]))
    # Second differences of a slow point are noise alone: sqrt(1 + 4 + 1) times its deviation.
    hip = np.diff(values[:, 23, 0], n=2)
    assert 0.6 * NOISE < np.median(np.abs(hip)) / 0.6745 / np.sqrt(6) / width < 1.6 * NOISE


def test_spaces_take_time() -> None:
    letters = load_letters(find_lexicon(), "ase")
    together = [len(synthesise(Phrase(f"u{i}", "abab", "t", "ase"), letters, 0)[0]) for i in range(20)]
    apart = [len(synthesise(Phrase(f"u{i}", "ab ab", "t", "ase"), letters, 0)[0]) for i in range(20)]
    assert 6 < np.mean(apart) - np.mean(together) < 16


@pytest.mark.parametrize("language", ["ukl", "tsm"])
def test_an_incomplete_alphabet_is_refused(language: str) -> None:
    with pytest.raises(UserError, match=f"letters .*'{language}'"):
        load_letters(find_lexicon(), language)
