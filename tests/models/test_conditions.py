"""Prefixes and languages of single clips: what a clip gets must not depend on the others of its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.test_languages import TOKENIZERS
from tests.small_configs import translator_config
from tests.written_corpora import write_corpus
from toolkit.batching.languages import language_id
from toolkit.corpus.packed import Clip, Corpus
from toolkit.decoding.search import search
from toolkit.errors import UserError
from toolkit.models import PoseFeatureExtractor, PoseProcessor, PoseTranslator
from toolkit.models.conditions import check_conditions, condition_notes
from toolkit.models.loss import translation_losses
from toolkit.models.processor import conditions_of
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.load import load_recipe

LANDMARKS = load_landmark_set("hands_body_50")
TEMPLATE = "{language} to {target_language}: {context}"
KNOWN = [
    {"language": "ins", "target_language": "hi", "context": "it rained all day long"},
    {},
    {"language": "ase", "target_language": "en"},
]
LENGTHS = (9, 20, 14)


def make_model(backbones: Mapping, kind: str, **settings) -> PoseTranslator:
    torch.manual_seed(0)
    return PoseTranslator(translator_config(backbones[kind], ctc=True, **settings)).eval()


@pytest.fixture
def templated() -> PoseProcessor:
    extractor = PoseFeatureExtractor(landmark_set=LANDMARKS.to_dict(), prefix_template=TEMPLATE, max_prefix_tokens=40)
    return PoseProcessor(extractor, make_tokenizer("bytes"))


@pytest.fixture
def batch(templated: PoseProcessor) -> Callable[..., dict[str, Tensor]]:
    """Model inputs of three clips of different lengths and prefixes, or of some of them."""
    numbers = np.random.default_rng(0)
    clips = [numbers.normal(size=(length, 50, 3)).astype(np.float16) for length in LENGTHS]

    def make(*chosen: int) -> dict[str, Tensor]:
        chosen = chosen or (0, 1, 2)
        padded = templated.feature_extractor.pad([clips[number] for number in chosen])
        return dict(templated.add_conditions(padded, [KNOWN[number] for number in chosen]))

    return make


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_clip_gives_the_same_alone_and_beside_longer_prefixes(backbones, batch, kind: str) -> None:
    model = make_model(backbones, kind, prefix_template=TEMPLATE, max_prefix_tokens=40)
    labels = torch.tensor([[5, 6, 7, 1], [8, 9, 1, -100], [10, 1, -100, -100]])
    together = model(**batch(), labels=labels)
    for number in range(3):
        alone = model(**batch(number), labels=labels[number : number + 1])
        torch.testing.assert_close(together.logits[number], alone.logits[0], rtol=1e-4, atol=1e-5)
        positions = int(alone.encoder_mask.sum())
        assert positions == -(-LENGTHS[number] // 2) == int(together.encoder_mask[number].sum())
        assert together.encoder_mask[number, :positions].all()
        scores = together.ctc_logits[number, :positions]
        torch.testing.assert_close(scores, alone.ctc_logits[0, :positions], rtol=1e-4, atol=1e-5)


def test_one_prefix_for_all_clips_gives_what_a_fixed_one_gives(backbones, batch, templated) -> None:
    ids = templated.tokenizer("ins:", add_special_tokens=False)["input_ids"]
    fixed = make_model(backbones, "t5", prefix_token_ids=ids)
    templated_model = make_model(backbones, "t5", prefix_template="{language}:", max_prefix_tokens=9)
    inputs = batch() | {"prefix_ids": torch.tensor([ids] * 3)}
    labels = torch.tensor([[5, 6, 1]] * 3)
    without = {name: value for name, value in inputs.items() if name != "prefix_ids"}
    wanted, found = fixed(**without, labels=labels), templated_model(**inputs, labels=labels)
    for name in ("logits", "ctc_logits"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_the_loss_sees_the_prefix(backbones, batch) -> None:
    model = make_model(backbones, "t5", prefix_template=TEMPLATE, max_prefix_tokens=40)
    inputs, labels, special = batch(), torch.tensor([[5, 6, 1]] * 3), torch.tensor([0, 1, 2])
    targets = {"labels": labels, "labelled": torch.arange(labels.numel()), "special_ids": special}
    nll, ctc = translation_losses(model, **inputs, **targets)
    other = inputs | {"prefix_ids": inputs["prefix_ids"].flip(0)}
    assert not torch.isclose(nll, translation_losses(model, **other, **targets)[0])
    assert ctc.isfinite()


def test_a_model_that_needs_a_prefix_says_so(backbones, batch) -> None:
    model = make_model(backbones, "t5", prefix_template=TEMPLATE, max_prefix_tokens=40)
    inputs = {name: value for name, value in batch().items() if name != "prefix_ids"}
    with pytest.raises(ValueError, match="prefix_ids"):
        model(**inputs, labels=torch.tensor([[5, 1]] * 3))


def test_a_long_prefix_is_truncated_and_a_saved_processor_fills_it(templated, tmp_path: Path) -> None:
    templated.save_pretrained(tmp_path)
    loaded = PoseProcessor.from_pretrained(tmp_path)
    padded = loaded.feature_extractor.pad([np.zeros((4, 50, 3), np.float16)] * 2)
    ids = loaded.add_conditions(padded, [{"context": "x" * 99}, {"language": "ase"}])["prefix_ids"]
    assert ids.shape == (2, 40) and (ids[0] >= 0).all()
    assert loaded.tokenizer.decode(ids[1][ids[1] >= 0]) == "ase to :"
    assert conditions_of(loaded) == ["language", "target_language", "context"]


@pytest.mark.parametrize("beams", [1, 3])
def test_each_text_begins_with_its_own_token(backbones, batch, templated, beams: int) -> None:
    model = make_model(backbones, "bart", prefix_template=TEMPLATE, max_prefix_tokens=40)
    model.generation_config.update(forced_bos_token_id=4, num_beams=beams, max_new_tokens=6)
    firsts = torch.tensor([65, 4, 70])
    found = model.generate(**batch(), first_tokens=firsts)
    assert found[:, 1].tolist() == firsts.tolist()
    assert model.generate(**batch())[:, 1].tolist() == [4, 4, 4]
    together = search(model, templated, **batch(), first_tokens=firsts)
    for number in range(3):
        (alone,) = search(model, templated, **batch(number), first_tokens=firsts[number : number + 1])
        assert [item.text for item in together[number]] == [item.text for item in alone]


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    def make(*known: dict[str, str]) -> Corpus:
        clips = [
            Clip(f"clip{number}", "good", np.ones((4, 50, 3), np.float16), **conditions)
            for number, conditions in enumerate(known)
        ]
        folder = tmp_path / f"corpus{len(list(tmp_path.iterdir()))}"
        return write_corpus(folder, {"train": clips}, LANDMARKS, 12.5)

    return make


def test_a_prefix_that_no_clip_fills_is_refused(make_corpus) -> None:
    corpus = make_corpus({"language": "ins"}, {})
    check_conditions(["language"], corpus, ["train"])
    with pytest.raises(UserError) as raised:
        check_conditions(["language", "context"], corpus, ["train"])
    assert "context" in raised.value.message and "column" in raised.value.hint


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_begins_with_the_language_of_its_clip(kind: str, tmp_path: Path, make_corpus) -> None:
    from toolkit.batching.loader import evaluation_batches

    make, code = TOKENIZERS[kind]
    make(tmp_path).save_pretrained(tmp_path / "tokenizer")
    tokenizer = make_tokenizer(str(tmp_path / "tokenizer"), language=code)
    other = {"hi_IN": "en_XX", "hin_Deva": "eng_Latn", "hi": "__en__"}[code]
    corpus = make_corpus({"target_language": other}, {}, {"target_language": code})
    check_conditions([], corpus, ["train"], tokenizer)
    (batch,) = evaluation_batches(corpus.splits["train"], tokenizer, 1000)
    english, hindi = language_id(tokenizer, other), language_id(tokenizer, code)
    assert batch.labels[:, 0].tolist() == [english, hindi, hindi]
    assert (batch.labels[:, 1:] == batch.labels[0, 1:]).all()
    with pytest.raises(UserError, match="target_language"):
        check_conditions([], make_corpus({"target_language": "klingon"}), ["train"], tokenizer)


def test_notes_name_what_is_missing_unused_and_truncated(make_corpus) -> None:
    corpus = make_corpus({"context": "x" * 200, "target_language": "hi"}, {"target_language": "en"}, {"context": "y"})
    recipe = load_recipe("t5_small", ["model.prefix='{context}'"])
    missing, unnamed, truncated = condition_notes(recipe, corpus, make_tokenizer("bytes"))
    assert "1 of 3" in missing and "context" in missing
    assert "2 values" in unnamed and "target_language" in unnamed
    assert "1 of 3" in truncated and "200" in truncated
    assert not list(condition_notes(load_recipe("t5_small"), make_corpus({"language": "ins"}), None))
