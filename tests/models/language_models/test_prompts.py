"""Words around the poses of a language model, with a chat template and without, and tokenizers that end no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.errors import UserError
from toolkit.models.language_models.prompts import words_around_poses
from toolkit.models.tokenizers import make_tokenizer, text_frame
from toolkit.recipe.sections.model import Model

WORDS = ["translate", "hindi", "into", "english", ":", "user", "answer", "good", "day", "\n", "{", "}", "poses"]
CHAT = (
    "{{ bos_token }}<turn>user\n{{ messages[0]['content'] | trim }}<turn>"
    "{% if add_generation_prompt %}answer\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a tokenizer as Llama's: a token begins every text, none ends it, and none pads."""
    special = ["<s>", "</s>", "<turn>", "<unk>"]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*special, *WORDS])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["<turn>"]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return make_tokenizer(str(folder), for_language_model=True)


def model_of(**settings: Any) -> Model:
    return Model(backbone="smollm2_135m", **settings)


def spelled(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_texts_end_and_begin_with_nothing(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="padding"):
        make_tokenizer(str(folder))
    assert spelled(tokenizer, tokenizer(text_target="good day")["input_ids"]) == "good day </s>"
    assert text_frame(tokenizer) == ([], []) and tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text_target="good day")["input_ids"] == tokenizer(text_target="good day")["input_ids"]


def test_without_words_a_text_starts_as_a_document_does(tokenizer: Any) -> None:
    words = words_around_poses(model_of(), tokenizer)
    assert (spelled(tokenizer, words.before), words.template, words.behind) == ("<s>", "", [])
    assert words.start == tokenizer.eos_token_id


def test_a_prefix_stands_behind_the_first_token(tokenizer: Any) -> None:
    words = words_around_poses(model_of(prefix="translate:"), tokenizer)
    assert spelled(tokenizer, words.before) == "<s> translate :"


def test_a_prompt_names_the_poses(tokenizer: Any) -> None:
    words = words_around_poses(model_of(prompt="translate {poses} into english:"), tokenizer)
    assert spelled(tokenizer, words.before) == "<s> translate"
    assert spelled(tokenizer, [*words.behind, words.start]) == "into english :"


def test_a_prompt_is_the_message_of_a_chat(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    words = words_around_poses(model_of(prompt="translate {poses} into english:"), tokenizer)
    assert spelled(tokenizer, words.before) == "<s> <turn> user \n translate"
    assert spelled(tokenizer, [*words.behind, words.start]) == "into english : <turn> answer \n"


@pytest.mark.parametrize("chat", [None, CHAT])
def test_conditions_of_a_clip_stand_behind_what_all_clips_have(tokenizer: Any, chat: str | None) -> None:
    tokenizer.chat_template = chat
    words = words_around_poses(model_of(prompt="translate {language} : {poses} english"), tokenizer)
    assert words.template == "translate {language} :"
    assert spelled(tokenizer, words.before) == ("<s> <turn> user \n" if chat else "<s>")
    assert spelled(tokenizer, [*words.behind, words.start]) == ("english <turn> answer \n" if chat else "english")


@pytest.mark.parametrize("chat", ["<turn>answer", "{{ messages[0]['content'] | replace('{', '') }}"])
def test_a_chat_template_that_drops_the_poses_is_refused(tokenizer: Any, chat: str) -> None:
    tokenizer.chat_template = chat
    with pytest.raises(UserError, match=r"model\.prompt") as refusal:
        words_around_poses(model_of(prompt="translate {poses}"), tokenizer)
    assert "\n" not in refusal.value.message and "model.prefix" in refusal.value.hint


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt": "translate"}, r"\{poses\}"),
        ({"prompt": "{poses} {poses}"}, "twice"),
        ({"prompt": "{poses} {language}"}, r"\{language\}"),
        ({"prompt": "{place} {poses}"}, r"\{place\}"),
        ({"prompt": "{poses}", "prefix": "translate"}, "prefix"),
    ],
)
def test_prompts_that_cannot_be(settings: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model_of(**settings)
