"""Several corpora opened as one: their clips, what is known of them, and what does not go together."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.corpus.data_settings import data_of
from tests.written_mixes import SIZES, write_one, write_three
from toolkit.corpus.mixture.opening import open_corpora, open_prepared
from toolkit.corpus.packed import Clips, Corpus
from toolkit.errors import UserError
from toolkit.recipe.schema import Data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_three(tmp_path_factory.mktemp("three"))


def opened(folders: list[Path], *settings: dict[str, Any]) -> Corpus:
    chosen = [*settings, *[{}] * (len(folders) - len(settings))]
    parts = [{"corpus": str(path), **own} for path, own in zip(folders, chosen, strict=True)]
    return open_corpora(Data.model_validate({"corpora": parts}))


def test_splits_hold_the_clips_of_all_corpora_one_after_the_other(folders: list[Path]) -> None:
    corpus = opened(folders)
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 66, "dev": 5, "test": 6}
    for name, split in corpus.splits.items():
        own = [Corpus.open(path).splits[name] for path in folders if name in SIZES[path.name]]
        clips = [clip for one in own for clip in one]
        assert list(split.uids) == [clip.uid for clip in clips] == [clip.uid for clip in split]
        assert list(split.texts) == [clip.text for clip in clips]
        assert split.texts[len(clips) - 1] == clips[-1].text
        assert split.frames.tolist() == [len(clip.features) for clip in clips]
        assert list(split.conditions()) == [clip.conditions for clip in clips]
        assert list(split.values("video")) == [clip.video for clip in clips]
        for ours, theirs in zip(split, clips, strict=True):
            assert np.array_equal(ours.features, theirs.features, equal_nan=True)
        assert {part.corpus: len(part.clips) for part in split.parts} == {
            path.name: SIZES[path.name][name] for path in folders if name in SIZES[path.name]
        }
    assert corpus.metadata.splits["train"]["clips"] == 66
    with pytest.raises(IndexError):
        corpus.splits["dev"].clip(5)


def test_a_split_without_clips_is_no_part_of_a_mix(tmp_path: Path) -> None:
    """All of its clips were rejected. A mean of scores would be n/a for it, and an epoch cannot draw from it."""
    paths = [write_one(tmp_path / "one", {"train": 4, "dev": 0, "test": 0}).path]
    paths.append(write_one(tmp_path / "other", {"train": 0, "dev": 2, "test": 0}).path)
    corpus = opened(paths)
    found = {name: [part.corpus for part in split.parts] for name, split in corpus.splits.items()}
    assert found == {"train": ["one"], "dev": ["other"]}


def test_a_corpus_says_what_is_known_of_its_clips(folders: list[Path]) -> None:
    split = opened(
        folders,
        {"language": "ins", "target_language": "hi_IN", "prefix": "{language} to {target_language}:"},
        {"prefix": "spelled {language}:"},
    ).splits["train"]
    conditions = list(split.conditions())
    assert conditions == [split.clip(index).conditions for index in range(66)]
    assert split.values("language") == [of_clip["language"] for of_clip in conditions]
    indices = [65, 0, 41, 7, 64, 0, 39, 40, 45, 46]
    together = split.read(np.array(indices))
    one_by_one = Clips.of([split.clip(index) for index in indices])
    assert list(together.conditions()) == [conditions[index] for index in indices]
    assert together.texts == one_by_one.texts
    assert all(map(np.array_equal, together.features, one_by_one.features))
    nothing = dict.fromkeys(("language", "target_language", "prompt", "context"), "")
    known = nothing | {"language": "ins", "target_language": "hi_IN", "prompt": "ins to hi_IN:"}
    assert conditions[:40] == [known] * 40
    assert conditions[40] == nothing | {"language": "gsg", "prompt": "spelled gsg:"}
    assert conditions[46] == nothing
    assert list(split.condition_counts()) == [(conditions[0], 40), (conditions[40], 6), (nothing, 20)]


def test_only_the_splits_that_are_named_are_used(folders: list[Path]) -> None:
    corpus = opened(folders, {"splits": ["train"]}, {"splits": ["dev", "test"]})
    assert [part.corpus for part in corpus.splits["train"].parts] == ["large", "synthetic"]
    assert [part.corpus for part in corpus.splits["dev"].parts] == ["small"]


def test_workers_get_the_paths_and_not_the_clips(folders: list[Path]) -> None:
    split = opened(folders).splits["train"]
    list(split)
    sent = pickle.dumps(split)
    assert len(sent) < 10_000
    assert list(pickle.loads(sent).uids) == list(split.uids)


def test_a_table_in_the_list_is_prepared_by_the_settings_of_the_mix(
    folders: list[Path], clips: Path, tmp_path: Path
) -> None:
    table = tmp_path / "made.csv"
    table.write_text((clips / "table.csv").read_text().replace("text", "sentence", 1))
    part = {"table": str(table), "poses": str(clips / "poses"), "columns": {"text": "sentence"}}
    data = data_of(clips, tmp_path, table=None, poses=None, corpora=[{"corpus": str(folders[0])}, part])
    train = open_corpora(data).splits["train"]
    assert [(one.corpus, len(one.clips)) for one in train.parts] == [("large", 40), ("made", 16)]
    (prepared,) = (tmp_path / "cache").glob("table-*/corpus.json")
    written = prepared.stat().st_mtime_ns
    assert len(open_corpora(data).splits["train"]) == 56 and prepared.stat().st_mtime_ns == written


def test_a_mix_is_planned_where_all_of_it_is_prepared(folders: list[Path]) -> None:
    parts: list[dict[str, str]] = [{"corpus": str(path)} for path in folders]
    there = open_prepared(Data.model_validate({"corpora": parts}))
    assert there and len(there.splits["train"]) == 66
    parts.append({"table": "x.csv", "poses": "poses"})
    assert open_prepared(Data.model_validate({"corpora": parts})) is None


@pytest.mark.parametrize(
    ("settings", "words"), [({"landmarks": "isign_76"}, ("isign_76", "hands_body_50")), ({"fps": 25.0}, ("25", "12.5"))]
)
def test_corpora_of_other_features_are_refused_with_the_command_that_prepares_them(
    folders: list[Path], tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    other = write_one(tmp_path / "other", {"train": 3}, **settings)
    with pytest.raises(UserError) as refusal:
        opened([*folders, other.path])
    assert all(word in refusal.value.message for word in (*words, "large", "other"))
    assert "launch/prepare.py" in refusal.value.hint
    assert "--landmarks hands_body_50" in refusal.value.hint and "--fps 12.5" in refusal.value.hint


@pytest.mark.parametrize(
    ("number", "settings", "word"),
    [(2, {"splits": ["train", "test"]}, "test"), (1, {"splits": ["dev"], "weight": 2}, "weight")],
)
def test_splits_and_weights_must_be_of_clips_that_are_there(
    folders: list[Path], number: int, settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError) as refusal:
        opened(folders, *[{}] * number, settings)
    assert word in refusal.value.message and folders[number].name in refusal.value.message
