"""Multilingual backbones: every text begins with the code of its language, in training as in generation."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import (
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

from tests.written_corpora import write_corpus
from toolkit.batching.languages import language_id
from toolkit.corpus.packed import Clip
from toolkit.errors import UserError
from toolkit.models.backbone import decoder_inputs
from toolkit.models.build import build_processor, build_translator
from toolkit.models.tokenizers import make_tokenizer, text_frame
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.resolve import resolve_named

VOCABULARY = [
    ("<unk>", 0.0),
    ("<s>", 0.0),
    ("</s>", 0.0),
    ("▁", -2.0),
    *((letter, -3.0) for letter in string.ascii_lowercase),
]
END = 2


def mbart50(_: Path) -> Any:
    return MBart50Tokenizer(vocab=VOCABULARY)


def nllb(_: Path) -> Any:
    words = ["<s>", "<pad>", "</s>", "<unk>", *(token for token, _ in VOCABULARY[3:])]
    return NllbTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def m2m100(folder: Path) -> Any:
    model = io.BytesIO()
    settings = {"vocab_size": 25, "model_type": "char", "hard_vocab_limit": False, "minloglevel": 2}
    texts = iter(["good day", "abc def", "hello there"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **settings)
    (folder / "spm.model").write_bytes(model.getvalue())
    words = ["<s>", "<pad>", "</s>", "<unk>", *(token for token, _ in VOCABULARY[3:])]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    files = {"vocab_file": str(folder / "vocab.json"), "spm_file": str(folder / "spm.model")}
    codes = [f"__{code}__" for code in M2M100Tokenizer(**files).lang_code_to_token]
    return M2M100Tokenizer(**files, additional_special_tokens=codes)


TOKENIZERS = {"mbart50": (mbart50, "hi_IN"), "nllb": (nllb, "hin_Deva"), "m2m100": (m2m100, "hi")}


@pytest.fixture(params=TOKENIZERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A saved multilingual tokenizer, and what it calls Hindi."""
    make, code = TOKENIZERS[request.param]
    make(tmp_path).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer", code


def test_texts_carry_the_language_and_saving_keeps_it(folder: tuple[Path, str], tmp_path: Path) -> None:
    path, code = folder
    tokenizer = make_tokenizer(str(path), language=code)
    hindi = language_id(tokenizer, code)
    assert text_frame(tokenizer) == ([hindi], [])
    ids = tokenizer(text_target="good")["input_ids"]
    assert (ids[0], ids[-1]) == (hindi, END)
    assert tokenizer.decode([END, *ids], skip_special_tokens=True) == "good"
    tokenizer.save_pretrained(tmp_path / "again")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert loaded(text_target="good")["input_ids"] == ids
    # A truncated text keeps its language and its end.
    ids = loaded(text_target="good good good", truncation=True, max_length=4)["input_ids"]
    assert (len(ids), ids[0], ids[-1]) == (4, hindi, END)


def test_a_language_is_asked_for_and_must_be_known(folder: tuple[Path, str]) -> None:
    path, _ = folder
    with pytest.raises(UserError, match=r"multilingual.*evaluation\.forced_language") as asked:
        make_tokenizer(str(path))
    with pytest.raises(UserError, match=r"evaluation\.forced_language.*'klingon'") as unknown:
        make_tokenizer(str(path), language="klingon")
    for error in (asked.value, unknown.value):
        assert " af" in error.hint or " ace_Arab" in error.hint


def test_m2m100s_codes_may_be_written_as_its_tokens_are(tmp_path: Path) -> None:
    tokenizer = m2m100(tmp_path)
    assert language_id(tokenizer, "__hi__") == language_id(tokenizer, "hi")


def test_a_language_for_a_tokenizer_that_has_none() -> None:
    with pytest.raises(UserError, match="'hi_IN'") as caught:
        make_tokenizer("bytes", language="hi_IN")
    assert "drop evaluation.forced_language" in caught.value.hint


def test_the_first_mbart_starts_from_the_code_behind_its_texts(tmp_path: Path) -> None:
    MBartTokenizer(vocab=VOCABULARY).save_pretrained(tmp_path)
    tokenizer = make_tokenizer(str(tmp_path), language="hi_IN")
    assert text_frame(tokenizer) == ([], [language_id(tokenizer, "hi_IN")])


BODY = {
    "d_model": 16,
    **{f"{half}_layers": 1 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 16 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
}
BACKBONES: dict[str, Callable[[int], Any]] = {
    "mbart50": lambda rows: MBartForConditionalGeneration(
        MBartConfig(vocab_size=rows, decoder_start_token_id=END, scale_embedding=True, **BODY)
    ),
    "m2m100": lambda rows: M2M100ForConditionalGeneration(M2M100Config(vocab_size=rows, **BODY)),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_generation_starts_as_training_does(name: str, tmp_path: Path) -> None:
    make, code = TOKENIZERS[name]
    tokenizer = make(tmp_path)
    torch.manual_seed(0)
    BACKBONES[name](len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    clip = Clip("clip", "good", np.ones((4, 50, 3), np.float16))
    corpus = write_corpus(
        tmp_path / "corpus", {"train": [clip]}, load_landmark_set("hands_body_50"), 10.0, NORMALISATION
    )
    overrides = [f"model.backbone={tmp_path / 'model'}", f"evaluation.forced_language={code}", "ds.bf16.enabled=false"]
    resolved = resolve_named("t5_small", overrides, 1, has_gpu=True, needs_data=False)
    processor = build_processor(resolved.recipe, corpus)
    model = build_translator(resolved, corpus, processor.tokenizer).eval()
    hindi = language_id(processor.tokenizer, code)

    labels = torch.tensor([processor.tokenizer(text_target="good")["input_ids"]])
    assert decoder_inputs(labels, model.config)[0, :2].tolist() == [END, hindi]
    poses, visible = torch.ones(1, 4, 50, 3), torch.ones(1, 4, 50, dtype=torch.bool)
    for beams in (1, 2):
        found = model.generate(poses, visible, visible[..., 0], num_beams=beams, max_new_tokens=5)
        assert found[0, :2].tolist() == [END, hindi]
