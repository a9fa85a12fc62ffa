"""The ``flores200`` tokenizer: BLEU on the tokens of a SentencePiece model, in the folder that sacreBLEU searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers import tokenizer_spm

from toolkit.errors import UserError
from toolkit.scoring.metrics import score

REFERENCES = ["मौसम अच्छा है", "今天天气很好", "the weather is fine today"]
HYPOTHESES = ["मौसम बुरा है", "今天天气不好", "the weather was fine"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tokenizer's model belongs, in a folder of this test; nothing is downloaded."""

    def offline(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", offline)
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "flores200sacrebleuspm"


def train_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model of the texts of this test, as the published one is of 200 languages."""
    prefix = path.with_name("trained")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((REFERENCES + HYPOTHESES) * 20),
        model_prefix=str(prefix),
        vocab_size=80,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    prefix.with_suffix(".model").rename(path)
    return sentencepiece.SentencePieceProcessor(str(path))


def test_bleu_counts_the_tokens_of_the_model_and_names_it(place: Path) -> None:
    model = train_model(place)
    scores = score(HYPOTHESES, REFERENCES, tokenize="flores200")
    tokens = [[" ".join(model.encode(text, out_type=str)) for text in texts] for texts in (HYPOTHESES, REFERENCES)]
    expected = BLEU(tokenize="none", force=True).corpus_score(tokens[0], [tokens[1]]).score
    assert scores.bleu4 == pytest.approx(expected, abs=1e-6)
    assert "tok:flores200" in scores.signature["bleu"]
    assert scores.bleu4 != pytest.approx(score(HYPOTHESES, REFERENCES).bleu4 or 0.0, abs=1.0)


@pytest.mark.parametrize("content", [None, b"no model"])
def test_without_a_usable_file_the_hint_says_where_it_belongs(place: Path, content: bytes | None) -> None:
    if content:
        place.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.tokenize.*flores200") as caught:
        score(HYPOTHESES, REFERENCES, tokenize="flores200")
    assert str(place) in caught.value.hint
