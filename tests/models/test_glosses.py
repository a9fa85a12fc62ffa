"""A CTC head that reads glosses: its vocabulary, its loss, its error rate, and what a run takes of another's."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from tests.models.warm_start.makers import HANDS, SMALL, inputs_of, make, motion, save
from tests.written_corpora import write_corpus
from toolkit.batching.collate import IGNORED_LABEL
from toolkit.batching.glosses import check_glosses, gloss_ids, gloss_vocabulary
from toolkit.batching.loader import train_batches
from toolkit.corpus.packed import Clip, Corpus
from toolkit.decoding.decode_split import find_hypotheses
from toolkit.errors import UserError
from toolkit.evaluation.results import write_results
from toolkit.evaluation.splits import score_splits
from toolkit.models import PoseTranslator
from toolkit.models.loss import ctc_loss, translation_losses
from toolkit.models.warm_start.filling import WarmStart
from toolkit.models.warm_start.plan import check_warm_start, make_plan
from toolkit.models.warm_start.source import read_source
from toolkit.planning.costs.counts import ASSUMED_GLOSSES, count
from toolkit.poses.features import NORMALISATION
from toolkit.recipe.resolve import resolve_named
from toolkit.training.evaluating import Evaluated

GLOSSES = ("GOOD DAY", "GOOD NIGHT", "SUN RED", "MOON BLUE")
TEXTS = ("good day", "good night", "red sun", "blue moon")
READS = (
    "training.ctc_target=gloss",
    "training.ctc_weight=0.5",
    "evaluation.num_beams=2",
    "evaluation.max_new_tokens=4",
)


def corpus_of(folder: Path, glosses: tuple[str, ...] = GLOSSES) -> Corpus:
    clips = [
        Clip(f"clip-{n}", text, motion(HANDS, 12 + n, seed=n).numpy(), gloss=gloss)
        for n, (text, gloss) in enumerate(zip(TEXTS, glosses, strict=True))
    ]
    return write_corpus(folder, {"train": clips, "test": clips[1:]}, HANDS, 12.5, NORMALISATION)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("glosses") / "corpus")


def resolved_of(*overrides: str):
    return resolve_named("t5_small", [*SMALL, *READS, *overrides], 1, has_gpu=False, ds="zero2", needs_data=False)


def test_the_vocabulary_and_the_ids_of_a_batch() -> None:
    vocabulary = gloss_vocabulary(["B A", "", "C  A"])
    assert vocabulary == ["A", "B", "C"]
    index = {gloss: place for place, gloss in enumerate(vocabulary)}
    ids = gloss_ids(["C A B", "A", "B"], index, torch.tensor([False, True, False]), IGNORED_LABEL)
    assert ids.tolist() == [[2, 0, 1], [-100, -100, -100], [1, -100, -100]]


def test_batches_have_glosses_where_ctc_reads_them(corpus: Corpus) -> None:
    glosses = sorted({gloss for of_clip in GLOSSES for gloss in of_clip.split()})
    workers = "training.workers=0"
    tokenizer = make(corpus, *READS).processor.tokenizer
    (batches,) = train_batches(corpus.splits["train"], tokenizer, resolved_of(workers), landmark_set=HANDS)
    for batch in batches:
        read = [" ".join(glosses[place] for place in row if place >= 0) for row in batch.gloss_labels.tolist()]
        assert read == [GLOSSES[clip] for clip in batch.clips.tolist()]
    plain = resolved_of(workers, "training.ctc_target=text")
    ((batch, *_),) = train_batches(corpus.splits["train"], tokenizer, plain, landmark_set=HANDS)
    assert batch.gloss_labels is None


def test_the_loss_is_ctc_of_the_glosses_and_the_head_as_large_as_their_vocabulary(corpus: Corpus) -> None:
    model = make(corpus, *READS).model
    assert model.config.ctc_vocabulary == ["BLUE", "DAY", "GOOD", "MOON", "NIGHT", "RED", "SUN"]
    assert model.ctc_head.out_features == 8
    inputs = inputs_of(HANDS)
    labels = torch.tensor([[2, 1], [2, 4], [6, 5], [3, -100]])
    places = (inputs["labels"] != IGNORED_LABEL).flatten().nonzero().squeeze(1)
    special = torch.tensor([0, 1, 2])  # which are glosses here
    nll, ctc = translation_losses(model, *inputs.values(), places, special, gloss_labels=labels)
    output = model(**inputs)
    alone = [
        ctc_loss(output.ctc_logits[n : n + 1], output.encoder_mask[n : n + 1], labels[n : n + 1], special[:0])
        for n in range(4)
    ]
    assert ctc.item() == pytest.approx(sum(alone).item(), rel=1e-5) and nll > 0
    positions = output.ctc_logits[3].log_softmax(-1)
    start, reached = positions[:, 3], positions[:, 7].cumsum(0)  # of the one gloss MOON: all alignments by hand
    total = torch.logsumexp(
        torch.stack(
            [
                (reached[first - 1] if first else 0) + start[first : last + 1].sum() + positions[last + 1 :, 7].sum()
                for first in range(len(positions))
                for last in range(first, len(positions))
            ]
        ),
        0,
    )
    assert alone[3].item() == pytest.approx(-total.item(), rel=1e-4)


def test_what_is_read_beside_a_text_changes_no_text_and_is_saved_with_the_model(corpus: Corpus, tmp_path: Path) -> None:
    made = make(corpus, *READS)
    model = PoseTranslator.from_pretrained(save(tmp_path / "model", made)).eval()
    assert model.config.ctc_vocabulary == made.model.config.ctc_vocabulary
    split = corpus.splits["train"]
    found = find_hypotheses(model, split, made.processor, batch_frames=40, n_best=2)
    for clip, hypotheses in zip(split, found, strict=True):
        poses = torch.from_numpy(clip.features.astype("float32"))[None]
        seen, frames = torch.ones(poses.shape[:3], dtype=torch.bool), torch.ones(poses.shape[:2], dtype=torch.bool)
        with torch.no_grad():
            output = model(poses, seen, frames, torch.zeros(1, 1, dtype=torch.long))
            tokens = model.generate(poses, seen, frames)
        best = [place for place, _ in groupby(output.ctc_logits[0].argmax(-1).tolist()) if place < 7]
        assert {item.gloss for item in hypotheses} == {" ".join(model.config.ctc_vocabulary[place] for place in best)}
        assert hypotheses[0].text == " ".join(made.processor.batch_decode(tokens)[0].split())
    model.config.ctc_vocabulary = []
    without = find_hypotheses(model, split, made.processor, batch_frames=40, n_best=2)
    assert [[replace(item, gloss=None) for item in of_clip] for of_clip in found] == without


def test_the_error_rate_of_glosses_is_among_the_scores(corpus: Corpus, tmp_path: Path) -> None:
    made = make(corpus, *READS)
    with torch.no_grad():
        made.model.ctc_head.weight.zero_()
        made.model.ctc_head.bias.copy_(torch.tensor([0, 0, 9.0, 0, 0, 0, 0, 0]))  # reads GOOD in every clip
    evaluation = resolved_of().recipe.evaluation
    results = score_splits(
        made.model, made.processor, corpus, ["test"], evaluation.model_copy(update={"batch_frames": 99})
    )
    assert results["test"].scores.gloss_wer == pytest.approx(5 / 6)
    assert results["test"].summary()["intervals"]["gloss_wer"][0] >= 0.5
    assert results["test"].floors["constant"].gloss_wer is None
    write_results(tmp_path, {}, results)
    assert (tmp_path / "test_glosses.csv").read_text().splitlines()[1] == '"clip-1","GOOD"'
    assert "gloss_wer 0.8333" in Evaluated([], results["test"].scores).line("cer")


def test_a_corpus_with_holes_is_refused(tmp_path: Path) -> None:
    holes = corpus_of(tmp_path / "holes", ("GOOD DAY", "GOOD NIGHT", "", "MOON BLUE"))
    with pytest.raises(UserError, match="clip-2"):
        check_glosses(resolved_of().recipe, holes)
    check_glosses(resolved_of("training.ctc_target=text").recipe, holes)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("evaluation.ctc_weight=0.3",), "evaluation.ctc_weight=0.3"),
        (("training.ctc_target=text", "evaluation.select_by=gloss_wer"), "evaluation.select_by=gloss_wer"),
        (("training.ctc_weight=0", "evaluation.select_by=gloss_wer"), "evaluation.select_by=gloss_wer"),
    ],
)
def test_settings_that_need_another_head(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError) as raised:
        resolved_of(*overrides)
    assert named in raised.value.message and raised.value.hint


def test_rows_of_a_head_are_taken_by_gloss(corpus: Corpus, tmp_path: Path) -> None:
    source = make(corpus, *READS, seed=1)
    folder = save(tmp_path / "source", source)
    others = corpus_of(tmp_path / "others", ("GOOD DAY", "STAR NIGHT", "SUN RED", "MOON BLUE"))
    taken = (*READS, f"model.init_from={folder}")
    recipe = resolved_of(*taken).recipe
    tokenizer = source.processor.tokenizer
    glosses = gloss_vocabulary(others.splits["train"].values("gloss"))
    plan = make_plan(read_source(str(folder)), recipe, HANDS, 12.5, tokenizer, glosses=glosses)
    assert plan.table[-1].what == "7 of 8 glosses by name"
    model = make(others, *taken, start=WarmStart(plan, None), seed=5).model
    old, new = source.model.config.ctc_vocabulary, model.config.ctc_vocabulary
    for name in ("weight", "bias"):
        was, got = getattr(source.model.ctc_head, name), getattr(model.ctc_head, name)
        for gloss in set(old) & set(new):
            assert torch.equal(got[new.index(gloss)], was[old.index(gloss)])
        assert torch.equal(got[-1], was[-1]), "the blank"
        assert torch.allclose(got[new.index("STAR")], was[:-1].mean(0))
    assert "7 of 8" in "".join(check_warm_start(recipe, others).lines())
    of_texts = resolved_of(*taken, "training.ctc_target=text").recipe
    plan = make_plan(read_source(str(folder)), of_texts, HANDS, 12.5, tokenizer)
    assert "glosses" in plan.table[-1].what and not [name for name in plan.mappings if name.startswith("ctc_head")]


def test_a_plan_counts_a_head_of_glosses_and_not_of_the_vocabulary() -> None:
    recipes = [
        resolved_of("model.tiny=false", "model.from_scratch=true", f"training.ctc_weight={weight}").recipe
        for weight in (0, 0.5)
    ]
    without, of_glosses = (sum(weight.numel for weight in count(recipe).weights) for recipe in recipes)
    assert of_glosses - without == (ASSUMED_GLOSSES + 1) * (512 + 1)
