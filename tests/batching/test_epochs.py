"""What epochs draw of several corpora: as often as weights and sizes say, without replacement, pass after pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from tests.written_mixes import write_three
from toolkit.batching import epochs
from toolkit.batching.collate import Batch
from toolkit.batching.epochs import Mixture, epoch_steps, mixture_of
from toolkit.batching.loader import train_batches
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.corpus.packed import Corpus, Part
from toolkit.fitting.kept_choices import settings_hash
from toolkit.planning.sizes.shapes import lengths_of
from toolkit.planning.workload import from_corpus
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.schema import Data

Weights = tuple[float, float] | None
weights = st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)) | st.tuples(st.just(0.0), st.floats(0.1, 10))
corpora = st.lists(st.tuples(st.integers(1, 300), weights), min_size=1, max_size=10)


def mixture(sizes: list[int], weights: list[Weights], epoch_clips: int, length: int = 5, **others: Any) -> Mixture:
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [
        Part(f"corpus{number}", range(ends[number], ends[number + 1]), weight) for number, weight in enumerate(weights)
    ]
    return Mixture(tuple(parts), epoch_clips, **{"temperature": 1.0, "epochs": length, "seed": 0, **others})


def counts(drawn: Mixture, epoch: int) -> list[int]:
    clips = drawn.epoch(epoch).clips
    return [int(np.isin(clips, part.clips).sum()) for part in drawn.parts]


@given(st.integers(1, 300), st.integers(0, 9))
def test_one_corpus_gives_each_clip_once_an_epoch_in_its_own_order(size: int, epoch: int) -> None:
    drawn = mixture([size], [None], size).epoch(epoch)
    assert drawn.clips.tolist() == list(range(size)) and set(drawn.passes.tolist()) == {epoch}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=10), st.integers(0, 9))
def test_corpora_without_weights_give_each_clip_once_an_epoch(sizes: list[int], epoch: int) -> None:
    drawn = mixture(sizes, [None] * len(sizes), sum(sizes)).epoch(epoch)
    assert sorted(drawn.clips.tolist()) == list(range(sum(sizes))) and set(drawn.passes.tolist()) == {epoch}


@given(corpora, st.integers(1, 2000), st.integers(1, 12))
def test_counts_follow_the_weights(parts: list[tuple[int, Weights]], epoch_clips: int, length: int) -> None:
    drawn = mixture([size for size, _ in parts], [pair for _, pair in parts], epoch_clips, length)
    due = np.zeros(len(parts))
    for epoch in range(length):
        due += np.array(drawn.shares(epoch)) * epoch_clips
        assert len(drawn.epoch(epoch).clips) == epoch_clips
        assert np.abs(drawn.drawn_before(epoch + 1) - due).max() < 2
        assert counts(drawn, epoch) == np.subtract(drawn.drawn_before(epoch + 1), drawn.drawn_before(epoch)).tolist()


@given(corpora, st.integers(1, 2000), st.integers(0, 3))
def test_each_pass_gives_every_clip_before_one_comes_again(
    parts: list[tuple[int, Weights]], epoch_clips: int, seed: int
) -> None:
    drawn = mixture([size for size, _ in parts], [pair for _, pair in parts], epoch_clips, 6, seed=seed)
    drawn_clips = [drawn.epoch(epoch) for epoch in range(6)]
    clips, passes = (np.concatenate([getattr(one, name) for one in drawn_clips]) for name in ("clips", "passes"))
    assert max(Counter(zip(clips.tolist(), passes.tolist(), strict=True)).values()) == 1
    for part in drawn.parts:
        own = Counter(passes[np.isin(clips, part.clips)].tolist())
        assert all(own[number] == len(part.clips) for number in range(max(own, default=0)))


@given(corpora, st.integers(1, 500), st.integers(0, 20))
def test_an_epoch_is_a_function_of_seed_epoch_and_recipe(
    parts: list[tuple[int, Weights]], epoch_clips: int, epoch: int
) -> None:
    """It does not matter which epochs were asked for before: a run resumes anywhere."""
    arguments: Any = ([size for size, _ in parts], [pair for _, pair in parts], epoch_clips, 7)
    for number in (3, 0, epoch):
        known = mixture(*arguments, seed=1).epoch(number)
    fresh = mixture(*arguments, seed=1)
    epochs._drawn.cache_clear()
    again = fresh.epoch(epoch)
    assert np.array_equal(known.clips, again.clips) and np.array_equal(known.passes, again.passes)


def test_passes_are_in_different_orders() -> None:
    drawn = mixture([1000], [None], 500)
    first, second, third = (set(drawn.epoch(epoch).clips.tolist()) for epoch in range(3))
    assert not first & second and len(first | second) == 1000
    assert 200 < len(first & third) < 300


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, (0.9, 0.1)), (2.0, (0.75, 0.25)), (1e9, (0.5, 0.5))])
def test_a_higher_temperature_draws_small_corpora_more_often(temperature: float, shares: tuple[float, float]) -> None:
    drawn = mixture([900, 100], [None, None], 1000, temperature=temperature)
    assert drawn.shares(0) == pytest.approx(shares)
    assert counts(drawn, 0) == [1000 * share for share in shares]


def test_a_weight_changes_linearly_over_the_run() -> None:
    drawn = mixture([100, 100], [(1.0, 0.0), (1.0, 1.0)], 1000, 50)
    first = [drawn.shares(epoch)[0] / drawn.shares(epoch)[1] for epoch in range(50)]
    assert first == pytest.approx(np.linspace(0.99, 0.01, 50))
    assert drawn.shares(60)[0] == 0  # a loader reads ahead of the end
    assert set(drawn.typical_clips().tolist()) == set(drawn.epoch(0).clips) | set(drawn.epoch(49).clips)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_three(tmp_path_factory.mktemp("three"))


Resolve = Callable[..., ResolvedRun]
Uids = list[list[str]]


def mixed(folders: list[Path], **others: Any) -> dict[str, Any]:
    """A ``data`` section in which small has half of the clips, and synthetic becomes rarer."""
    parts = [{"corpus": str(path), "weight": weight} for path, weight in zip(folders, (1, 2, [2, 0]), strict=True)]
    return {"corpora": parts, **others}


def steps_of(resolved: ResolvedRun, corpus: Corpus, **place: Any) -> list[list[Batch]]:
    stream = train_batches(corpus.splits["train"], ByT5Tokenizer(), resolved, landmark_set=corpus.landmark_set, **place)
    return list(stream)


def uids_of(steps: list[list[list[Batch]]]) -> Uids:
    """The clips of each step over all ranks, without fillers, sorted."""
    return [
        sorted(
            uid
            for of_rank in ranks
            for batch in of_rank
            for uid, is_filler in zip(batch.uids, batch.is_filler.tolist(), strict=True)
            if not is_filler
        )
        for ranks in zip(*steps, strict=True)
    ]


@pytest.mark.parametrize("padding", ["longest", "ladder"])
def test_steps_hold_the_same_clips_on_any_number_of_ranks_and_after_a_resume(
    folders: list[Path], resolve: Resolve, padding: str
) -> None:
    data = mixed(folders, epoch_clips=52)
    runs = [
        resolve(world_size=ranks, micro=2, accumulation=12 // (2 * ranks), padding=padding, data=data)
        for ranks in (1, 2, 3)
    ]
    corpus = open_corpora(runs[0].recipe.data)
    assert epoch_steps(corpus.splits["train"], runs[0].recipe) == 5
    for epoch in (0, 3):
        found = [
            uids_of([steps_of(run, corpus, epoch=epoch, rank=rank) for rank in range(run.world_size)]) for run in runs
        ]
        assert found[0] == found[1] == found[2] and len(found[0]) == 5
        assert uids_of([steps_of(runs[0], corpus, epoch=epoch, start_step=3)]) == found[0][3:]
        by_corpus = Counter(uid.split("-")[0] for step in found[0] for uid in step)
        drawn = mixture_of(corpus.splits["train"], runs[0].recipe)
        assert [by_corpus[part.corpus] for part in drawn.parts] == counts(drawn, epoch)


def test_a_clip_that_an_epoch_gives_twice_is_augmented_twice(folders: list[Path], resolve: Resolve) -> None:
    resolved = resolve(data=mixed(folders), augmentation={"rotation": 10.0, "speed": 0.3})
    corpus = open_corpora(resolved.recipe.data)
    seen: dict[str, list[bytes]] = {}
    for batch in (batch for step in steps_of(resolved, corpus) for batch in step):
        for row, uid in enumerate(batch.uids):
            if not batch.is_filler[row]:
                seen.setdefault(uid, []).append(batch.poses[row, batch.frame_mask[row]].numpy().tobytes())
    repeated = [versions for uid, versions in seen.items() if uid.startswith("small")]
    assert min(map(len, repeated)) >= 4
    assert all(len(set(versions)) == len(versions) for versions in repeated)


def test_one_corpus_in_a_list_is_that_corpus(folders: list[Path], resolve: Resolve) -> None:
    alone, listed = ({"corpus": str(folders[0])}, {"corpora": [str(folders[0])]})
    assert open_corpora(Data.model_validate(listed)).path == folders[0]
    runs = [resolve(data=data, augmentation={"speed": 0.3}) for data in (alone, listed)]
    first, second = (steps_of(run, open_corpora(run.recipe.data), epoch=2) for run in runs)
    for ours, theirs in zip(first, second, strict=True):
        assert [batch.uids for batch in ours] == [batch.uids for batch in theirs]
        assert all(batch.poses.equal(other.poses) for batch, other in zip(ours, theirs, strict=True))


def test_plan_and_rehearsal_count_the_clips_of_an_epoch(folders: list[Path], resolve: Resolve) -> None:
    """Six clips are a step of six, whatever the corpora hold; the longest clip may come in any epoch."""
    data = mixed(folders, epoch_clips=6)
    runs = [resolve(padding=padding, data=data) for padding in ("longest", "ladder")]
    corpus = open_corpora(runs[0].recipe.data)
    longest = int(corpus.splits["train"].frames.max())
    for run in runs:
        lengths = lengths_of(run, corpus.splits["train"])
        assert lengths.share == 6 and lengths.longest >= longest
    workload = from_corpus(runs[1].recipe, corpus, 1)
    assert workload.steps_per_epoch == 1 and workload.frames >= longest
    assert from_corpus(resolve(data=mixed(folders)).recipe, corpus, 1).steps_per_epoch == 9


def test_a_choice_of_micro_batches_is_for_the_weights_that_it_was_made_with(
    folders: list[Path], resolve: Resolve
) -> None:
    plain: dict[str, Any] = {"corpora": [str(path) for path in folders]}
    runs = [resolve(data=data) for data in (plain, {**plain, "temperature": 2.0}, mixed(folders))]
    hashes = [settings_hash(run, open_corpora(run.recipe.data)) for run in (*runs, runs[0])]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_a_longer_run_draws_the_same_clips_by_constant_weights() -> None:
    short, long = (mixture([30, 9], [(2.0, 2.0), (1.0, 1.0)], 20, length) for length in (5, 9))
    for epoch in range(5):
        assert np.array_equal(short.epoch(epoch).clips, long.epoch(epoch).clips)
