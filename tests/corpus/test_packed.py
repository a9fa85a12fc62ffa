import json
import pickle

import numpy as np
import pytest

from tests.written_corpora import write_corpus
from toolkit.corpus.packed import METADATA_FILE, Clip, Clips, Corpus
from toolkit.errors import UserError
from toolkit.poses.landmarks import load_landmark_set

SET = load_landmark_set("hands_body_50")


def _clips(count: int) -> list[Clip]:
    rng = np.random.default_rng(0)
    clips = []
    for index in range(count):
        features = rng.normal(size=(int(rng.integers(1, 40)), 50, 3)).astype(np.float16)
        features[0, 3:9] = np.nan
        clips.append(Clip(f"uid-{index}", f"text {index} é", features, f"video {index // 2}", "ase", 0.5))
    return clips


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    clips = _clips(610)  # more than two record batches
    return write_corpus(tmp_path / "corpus", {"train": clips[:600], "dev": clips[600:]}, SET, fps=12.5)


def _same(left: Clip, right: Clip) -> bool:
    names = ("uid", "text", "video", "language", "hands_visible")
    return all(getattr(left, name) == getattr(right, name) for name in names) and np.array_equal(
        left.features, right.features, equal_nan=True
    )


def test_what_was_packed_is_read(corpus: Corpus) -> None:
    clips = _clips(610)
    train, dev = corpus.splits["train"], corpus.splits["dev"]
    assert (len(train), len(dev)) == (600, 10)
    assert all(_same(packed, clip) for packed, clip in zip([*train, *dev], clips, strict=True))
    assert train.frames.tolist() == [len(clip.features) for clip in clips[:600]] and train.frames.dtype == np.int32
    assert list(train.texts) == [clip.text for clip in clips[:600]]
    assert dev.uids[2] == "uid-602" and dev.uids[-2:] == ["uid-608", "uid-609"]
    assert corpus.landmark_set == SET and corpus.metadata.fps == 12.5
    assert corpus.metadata.splits["dev"] == {"clips": 10, "frames": int(dev.frames.sum())}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_landmark_with_any_unusable_channel_is_missing_in_all(tmp_path, bad: float) -> None:
    features = np.zeros((3, 50, 3), np.float32)
    features[1, 7, 2] = bad
    with np.errstate(over="ignore"):
        clip = write_corpus(tmp_path / "c", {"train": [Clip("a", "b", features)]}, SET, 12.5).splits["train"].clip(0)
    missing = np.isnan(clip.features)
    assert missing[1, 7].all() and missing.sum() == 3 and np.isfinite(clip.features[~missing]).all()


def test_conditions_are_packed_and_corpora_without_them_are_read(tmp_path, monkeypatch) -> None:
    known = {"language": "ins", "target_language": "hi_IN", "prompt": "shortly", "context": "It rains."}
    features = np.zeros((3, 50, 3), np.float16)
    clips = [Clip("a", "b", features, **known), Clip("c", "d", features)]
    split = write_corpus(tmp_path / "new", {"train": clips}, SET, 12.5).splits["train"]
    assert [clip.conditions for clip in split] == list(split.conditions()) == [known, dict.fromkeys(known, "")]
    assert list(split.condition_counts()) == [(known, 1), (dict.fromkeys(known, ""), 1)]
    monkeypatch.setattr("toolkit.corpus.writer.TEXT_COLUMNS", ("uid", "text", "video", "language"))
    split = write_corpus(tmp_path / "old", {"train": clips}, SET, 12.5).splits["train"]
    assert [clip.language for clip in split] == ["ins", ""] and not split.clip(0).context
    assert next(split.conditions()) == dict.fromkeys(known, "") | {"language": "ins"}


def test_features_are_read_only_views(corpus: Corpus) -> None:
    features = corpus.splits["train"].clip(300).features
    assert features.dtype == np.float16 and not features.flags.owndata and not features.flags.writeable


def test_a_split_pickles_as_its_path(corpus: Corpus) -> None:
    split = corpus.splits["train"]
    assert len(split) == 600
    pickled = pickle.dumps(split)
    assert len(pickled) < 500
    assert _same(pickle.loads(pickled).clip(599), split.clip(599))


def test_clips_read_together_are_those_read_one_by_one(corpus: Corpus) -> None:
    split = corpus.splits["train"]
    indices = [599, 3, 256, 255, 3, 0]
    one_by_one = Clips.of([split.clip(index) for index in indices])
    together = split.read(indices)
    assert together.texts == one_by_one.texts and len(set(together.texts["uid"])) == 5
    assert together.texts["uid"] == [split.uids[index] for index in indices]
    for ours, theirs in zip(together.features, one_by_one.features, strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True) and not ours.flags.owndata


def test_clips_beyond_those_that_a_process_keeps_are_the_same(corpus: Corpus, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.corpus.packed.MOST_KEPT", 4)
    split, indices = Corpus.open(corpus.path).splits["train"], [*range(250, 260), 3, 3]
    wanted = corpus.splits["train"].read(indices)
    for _ in range(2):  # the first time, and with some of them kept
        found = split.read(indices)
        assert found.texts == wanted.texts
        assert all(map(np.array_equal, found.features, wanted.features, [True] * len(indices)))
        assert len(split._kept) == 4
    assert not split.read([]).features and split.read([]).texts.keys() == wanted.texts.keys()


@pytest.mark.parametrize("index", [-1, 600])
def test_no_clip_there(corpus: Corpus, index: int) -> None:
    with pytest.raises(IndexError, match=f"{index} .*600 .*train"):
        corpus.splits["train"].clip(index)
    with pytest.raises(IndexError):
        corpus.splits["train"].read([0, index])


def test_the_datasets_library_opens_it(corpus: Corpus) -> None:
    from datasets import load_from_disk

    opened = load_from_disk(str(corpus.path))
    assert {name: len(split) for name, split in opened.items()} == {"train": 600, "dev": 10}
    row = opened["dev"][3]
    expected = corpus.splits["dev"].clip(3)
    assert (row["uid"], row["text"], row["frames"]) == (expected.uid, expected.text, len(expected.features))
    np.testing.assert_array_equal(np.float16(row["features"]).reshape(-1, 50, 3), expected.features)


def test_beyond_float16_is_missing(tmp_path) -> None:
    features = np.full((1, 50, 3), 1e9, np.float32)
    corpus = write_corpus(tmp_path / "c", {"train": [Clip("a", "b", features)]}, SET, fps=25)
    assert np.isnan(corpus.splits["train"].clip(0).features).all()


def test_a_folder_that_is_no_corpus_is_an_error(corpus: Corpus, tmp_path) -> None:
    with pytest.raises(UserError, match=r"corpus\.json"):
        Corpus.open(tmp_path)
    metadata = json.loads((corpus.path / METADATA_FILE).read_text())
    (corpus.path / METADATA_FILE).write_text(json.dumps(metadata | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        Corpus.open(corpus.path)
