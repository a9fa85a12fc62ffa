"""A split is translated the same in batches of any size and on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.process_groups import run_in_two_processes
from tests.same_translations import assert_same_translations
from toolkit.batching.ladder import fitted_rungs
from toolkit.corpus.packed import Corpus
from toolkit.decoding.decode_split import evaluation_mode, find_hypotheses, translate_split
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.scoring.predictions import read_predictions, write_predictions

Make = Callable[..., PoseTranslator]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_one_clip_a_batch_or_many_give_the_same(
    translator: Make, processor: PoseProcessor, corpus: Corpus, kind: str
) -> None:
    model, split = translator(kind, vocabulary=384), corpus.splits["test"]
    alone = translate_split(model, split, processor, batch_frames=1)
    together = translate_split(model, split, processor, batch_frames=32 * int(split.frames.max()))
    assert [row.uid for row in alone] == list(split.uids)
    assert [row.reference for row in alone] == list(split.texts)
    for one, other in zip(alone, together, strict=True):
        # Scores are rounded to four digits; two that are next to each other may round away from each other.
        assert one.score == pytest.approx(other.score, abs=1.01e-4)
        assert one.hypothesis == other.hypothesis


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_few_shapes_give_the_same(translator: Make, processor: PoseProcessor, corpus: Corpus, kind: str) -> None:
    model, split = translator(kind, vocabulary=384), corpus.splits["test"]
    shapes: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    found = {}
    for few in shapes:
        seen = model.pose_encoder.register_forward_hook(
            lambda _, inputs, __, few=few: shapes[few].add(tuple(inputs[0].shape[:2]))
        )
        found[few] = find_hypotheses(model, split, processor, batch_frames=120, few_shapes=few)
        seen.remove()
    rungs = set(fitted_rungs(split.frames, 2))
    assert {frames for _, frames in shapes[True]} <= rungs
    assert not {frames for _, frames in shapes[False]} <= rungs
    for (one,), (other,) in zip(found[False], found[True], strict=True):
        assert one.text == other.text and one.score == pytest.approx(other.score, abs=1.01e-4)


def test_n_best_are_sorted_begin_with_the_best_and_differ(
    translator: Make, processor: PoseProcessor, corpus: Corpus
) -> None:
    model, split = translator(vocabulary=384), corpus.splits["test"]
    best = translate_split(model, split, processor, batch_frames=1200)
    found = find_hypotheses(model, split, processor, batch_frames=1200, n_best=4)
    assert {len(row) for row in found} == {4}
    for row, prediction in zip(found, best, strict=True):
        scores = [item.score for item in row]
        assert scores == sorted(scores, reverse=True)
        assert row[0].text == prediction.hypothesis and row[0].score == pytest.approx(prediction.score, abs=1.01e-4)


def test_greedy_search_has_no_scores(translator: Make, processor: PoseProcessor, corpus: Corpus) -> None:
    predictions = translate_split(translator(), corpus.splits["test"], processor, batch_frames=1200, num_beams=1)
    assert {row.score for row in predictions} == {None}


def test_progress_is_reported_after_each_batch(translator: Make, processor: PoseProcessor, corpus: Corpus) -> None:
    done: list[int] = []
    translate_split(translator(), corpus.splits["test"], processor, batch_frames=300, on_batch=done.append)
    assert done == sorted(done) and done[-1] == len(corpus.splits["test"]) and len(done) > 3


def test_a_language_is_forced_on_every_text(translator: Make, processor: PoseProcessor, corpus: Corpus) -> None:
    letter = processor.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    found = translate_split(
        translator(vocabulary=384), corpus.splits["test"], processor, batch_frames=1200, forced_bos_token_id=letter
    )
    assert all(row.hypothesis.startswith("q") for row in found)


def test_dropout_is_off_within_and_on_again_afterwards(translator: Make) -> None:
    model = translator().train()
    with evaluation_mode(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()


def translate_as_rank(rank: int, model: PoseTranslator, processor: PoseProcessor, path: Path, out: Path) -> None:
    split = Corpus.open(path).splits["test"]
    for synced in (False, True):
        rows = translate_split(model, split, processor, batch_frames=300, rank=rank, world_size=2, synced=synced)
        write_predictions(out / f"rank{rank}_{synced}.csv", rows)


@pytest.mark.process
def test_two_ranks_write_the_translations_that_one_writes(
    tmp_path: Path, translator: Make, processor: PoseProcessor, corpus: Corpus
) -> None:
    model = translator(vocabulary=384)
    write_predictions(tmp_path / "one.csv", translate_split(model, corpus.splits["test"], processor, batch_frames=300))
    run_in_two_processes(translate_as_rank, model, processor, corpus.path, tmp_path)
    assert len(read_predictions(tmp_path / "one.csv")) == 37
    for name in ("rank0_False", "rank1_False", "rank0_True", "rank1_True"):
        assert_same_translations(tmp_path / f"{name}.csv", tmp_path / "one.csv")


def test_settings_of_the_model_itself_are_left_alone(
    translator: Make, processor: PoseProcessor, corpus: Corpus
) -> None:
    model = translator()
    before = model.generation_config.to_dict()
    translate_split(model, corpus.splits["test"], processor, batch_frames=1200, num_beams=2, max_new_tokens=3)
    assert model.generation_config.to_dict() == before
