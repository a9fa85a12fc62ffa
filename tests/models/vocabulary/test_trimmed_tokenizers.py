"""A trimmed tokenizer tokenises the texts that it was trimmed to as the full one does, and still writes any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.models.vocabulary.makers import FAMILIES, OF_LANGUAGE_MODELS, saved, texts
from toolkit.batching.languages import languages_of
from toolkit.errors import UserError
from toolkit.models.tokenizers import make_tokenizer, text_frame
from toolkit.models.vocabulary.sentencepiece import read_subwords, without_others
from toolkit.models.vocabulary.trimming import Trimming, check_trimmable, fingerprint_of, trimmed, trimming_of


@pytest.fixture(scope="module", params=FAMILIES)
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = saved(request.param, tmp_path_factory.mktemp("tokenizers"))
    is_of_language_model = request.param in OF_LANGUAGE_MODELS
    return make_tokenizer(str(place), language=FAMILIES[request.param][1], for_language_model=is_of_language_model)


def trimmed_to(tokenizer: Any, kept: list[str]) -> tuple[Any, Trimming]:
    ids = {place for ids in tokenizer(text_target=kept)["input_ids"] for place in ids}
    smaller, trimming = trimmed(tokenizer, ids, "it")
    assert trimming_of(smaller) == trimming
    return smaller, trimming


@settings(max_examples=12, deadline=None)
@given(chosen=st.lists(st.integers(0, 1499), min_size=1, max_size=12, unique=True), others=st.integers(0, 1499))
def test_kept_texts_have_the_tokens_of_the_full_tokenizer(full: Any, chosen: list[int], others: int) -> None:
    kept = [texts()[place] for place in chosen]
    smaller, trimming = trimmed_to(full, kept)
    assert len(smaller) == len(trimming.kept) < trimming.tokens == len(full)
    for text in kept:
        ids = smaller(text_target=text)["input_ids"]
        assert [trimming.kept[place] for place in ids] == full(text_target=text)["input_ids"]
        assert smaller.decode(ids) == full.decode(full(text_target=text)["input_ids"])
    for text in (texts()[others], f"{kept[0]} {texts()[others][::-1]}"):
        # Whatever the full tokenizer can write the trimmed one can.
        ids = smaller(text_target=text)["input_ids"]
        if full.unk_token_id not in full(text_target=text)["input_ids"]:
            assert smaller.unk_token_id not in ids
        assert smaller.decode(ids, skip_special_tokens=True) == full.decode(
            full(text_target=text)["input_ids"], skip_special_tokens=True
        )


def test_special_tokens_and_languages_stay(full: Any) -> None:
    smaller, trimming = trimmed_to(full, texts()[:3])
    assert smaller.get_added_vocab().keys() == full.get_added_vocab().keys()
    for role in ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token"):
        assert getattr(smaller, role) == getattr(full, role)
        if token := getattr(full, role):
            new = smaller.convert_tokens_to_ids(token)
            assert trimming.kept[new] == full.convert_tokens_to_ids(token)
    assert languages_of(smaller) == languages_of(full)
    frames = [text_frame(tokenizer) for tokenizer in (smaller, full)]
    assert [[trimming.kept[place] for place in part] for part in frames[0]] == [list(part) for part in frames[1]]


def test_a_trimmed_tokenizer_is_saved_and_loaded_by_transformers_alone(full: Any, tmp_path: Path) -> None:
    smaller, trimming = trimmed_to(full, texts()[:8])
    smaller.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(smaller)
    assert loaded.get_vocab() == smaller.get_vocab()
    assert loaded(text_target=texts()[:20])["input_ids"] == smaller(text_target=texts()[:20])["input_ids"]
    assert trimming_of(loaded) == trimming
    assert trimming.fingerprint == fingerprint_of(full)
    assert "/tmp" not in json.dumps(json.loads((tmp_path / "tokenizer_config.json").read_text()))


def test_trimming_keeps_no_more_than_it_must(full: Any) -> None:
    smaller, _ = trimmed_to(full, texts()[:2])
    subwords = {token for token in smaller.get_vocab() if len(token) > 2} - smaller.get_added_vocab().keys()
    inside = "".join(
        full.convert_ids_to_tokens([i for text in texts()[:2] for i in full(text_target=text)["input_ids"]])
    )
    lowest = 1
    strangers = [
        subword for subword in subwords if subword not in inside and not subword.startswith(("<0x", "<", ">>"))
    ]
    assert len(strangers) <= lowest, strangers


def test_bytes_are_refused() -> None:
    with pytest.raises(UserError, match=r"'bytes'.*subwords"):
        check_trimmable(make_tokenizer("bytes"), "bytes")


def test_fields_of_a_sentencepiece_model_that_are_not_known_are_kept() -> None:
    from tests.models.vocabulary.makers import spm

    model = spm("unigram")
    subwords = read_subwords(model)
    assert without_others(model, {subword.text for subword in subwords}) == model
    assert [subword.text for subword in subwords[:3]] == ["<unk>", "<s>", "</s>"]
    with pytest.raises(ValueError, match="inside"):
        read_subwords(model[:-1])
