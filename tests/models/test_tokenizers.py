"""Tokenizers that need no hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from toolkit.errors import UserError
from toolkit.models.tokenizers import find_unknown_characters, make_tokenizer, special_ids, train_tokenizer

TEXTS = ["good morning to you all", "नमस्ते दुनिया", "你好世界", "Übung macht den Meister"] * 3


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
def test_bytes_spell_any_text(text: str) -> None:
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer(text_target=text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", sorted(set(TEXTS)))
def test_a_trained_tokenizer_spells_what_it_was_trained_on(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS)
    ids = tokenizer(text_target=text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_is_repeatable_and_survives_saving(tmp_path: Path) -> None:
    first, second = train_tokenizer(TEXTS), train_tokenizer(TEXTS)
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[0])["input_ids"] == first(TEXTS[0])["input_ids"]


def test_special_ids_hold_the_end_of_sentence() -> None:
    tokenizer = make_tokenizer("bytes")
    assert tokenizer.eos_token_id in special_ids(tokenizer)
    assert tokenizer("a")["input_ids"][0] not in special_ids(tokenizer)


def test_a_tokenizer_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nowhere") as refusal:
        make_tokenizer(str(tmp_path / "nowhere"))
    assert "model.tokenizer=bytes" in refusal.value.hint


def test_characters_that_cannot_be_written_are_counted() -> None:
    tokenizer = train_tokenizer(["abc abd bcd"] * 9)
    texts = ["abc ß", "good ßß", "abc", "abd"]
    unknown = find_unknown_characters(tokenizer, texts)
    assert unknown is not None
    assert unknown.characters[0] == ("ß", 3)
    assert {character for character, _ in unknown.characters} == {"ß", "g", "o"}
    assert unknown.text_share == 0.5
    assert unknown.character_share == pytest.approx(6 / 16)
    assert "ß U+00DF (3x)" in str(unknown) and "37.50%" in str(unknown) and "\n" not in str(unknown)


def test_nothing_is_unknown_to_bytes_or_in_what_was_trained_on() -> None:
    assert find_unknown_characters(make_tokenizer("bytes"), TEXTS) is None
    assert find_unknown_characters(train_tokenizer(TEXTS), TEXTS) is None
    assert find_unknown_characters(train_tokenizer(TEXTS), []) is None


def test_a_mark_that_is_unknown_only_by_itself_is_not_reported() -> None:
    # NFC puts the letter and the combining mark together before the tokenizer looks at them.
    tokenizer = train_tokenizer(["caf\u00e9 ole"] * 9)
    assert find_unknown_characters(tokenizer, ["cafe\u0301"]) is None


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="end-of-sentence") as refusal:
        make_tokenizer(str(tmp_path))
    assert "\n" not in str(refusal.value)
