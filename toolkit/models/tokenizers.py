"""Which tokenizer turns texts into target tokens: the backbone's own, bytes, or one trained on the corpus.

``bytes`` (ByT5's scheme, Xue et al. 2022) and ``train`` need no hub and no download.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.errors import UserError

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]
TRAINED_VOCABULARY = 8000


def make_tokenizer(kind: str, texts: Iterable[str] = (), *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Make or load a tokenizer.

    Args:
        kind: ``bytes``, ``train``, a hub id or a folder.
        texts: training texts, read only by ``train``.
        trust_remote_code: whether code that comes with a hub model may run.

    Raises:
        UserError: the hub id or folder cannot be loaded.
    """
    if kind == "bytes":
        return ByT5Tokenizer()
    if kind == "train":
        return train_tokenizer(texts)
    try:
        return AutoTokenizer.from_pretrained(kind, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"the tokenizer {kind!r} cannot be loaded ({first_line}): name a folder that holds it, set HF_HOME to a "
            "cache that does, or use model.tokenizer=bytes, which needs no download"
        ) from error


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a SentencePiece-style unigram tokenizer (Kudo 2018); the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=TRAINED_VOCABULARY, special_tokens=SPECIAL_TOKENS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model = _in_fixed_order(tokenizer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _in_fixed_order(tokenizer: Tokenizer) -> models.Unigram:
    """The trained model with pieces of equal score in alphabetical order; the trainer leaves that to chance."""
    trained = json.loads(tokenizer.to_str())["model"]
    special, pieces = trained["vocab"][: len(SPECIAL_TOKENS)], trained["vocab"][len(SPECIAL_TOKENS) :]
    ordered = sorted(((piece, score) for piece, score in pieces), key=lambda entry: (-entry[1], entry[0]))
    return models.Unigram([*map(tuple, special), *ordered], unk_id=trained["unk_id"], byte_fallback=False)


def special_ids(tokenizer: Any) -> list[int]:
    """Ids that frame a text but are no part of it."""
    return sorted(set(tokenizer.all_special_ids))


def language_id(tokenizer: Any, code: str) -> int:
    """The token with which a multilingual backbone begins a text in this language.

    Raises:
        UserError: the tokenizer knows no such language; the message names those that it knows.
    """
    # T5's and ByT5's <extra_id_0> are no languages.
    codes = sorted(token for token in tokenizer.get_added_vocab() if "_" in token and token[0] != "<")
    if code in codes:
        return int(tokenizer.convert_tokens_to_ids(code))
    known = f"it knows {', '.join(codes[:12])}{', ...' if len(codes) > 12 else ''}" if codes else "it has none at all"
    raise UserError(f"evaluation.forced_language: the tokenizer has no language {code!r}: {known}")
