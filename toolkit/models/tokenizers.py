"""Which tokenizer turns texts into target tokens: the backbone's own, bytes, or one trained on the corpus.

``bytes`` (ByT5's scheme, Xue et al. 2022) and ``train`` need no hub and no download.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.batching.languages import language_id, languages_of
from toolkit.errors import UserError, first_line
from toolkit.models.loading.hub import NOT_LOADED, HubTrouble, hub_trouble

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]
TRAINED_VOCABULARY = 8000


def make_tokenizer(
    kind: str,
    texts: Iterable[str] = (),
    *,
    language: str | None = None,
    trust_remote_code: bool = False,
    for_language_model: bool = False,
    local_only: bool = False,
) -> PreTrainedTokenizerBase:
    """Make or load a tokenizer: ``bytes``, ``train`` (on the texts), or one of a hub id or a folder.

    With ``language``, as a multilingual tokenizer calls it, every text carries its code. ``for_language_model``: that
    of a language model begins its input with a token, and ends no text; here it ends each, and begins none.
    ``local_only`` downloads nothing.

    Raises:
        UserError: the hub id or folder cannot be loaded, does not know the language, needs one that is not given, or
            ends texts in no token.
    """
    if kind == "bytes":
        tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer()
    elif kind == "train":
        tokenizer = train_tokenizer(texts)
    else:
        tokenizer = _load_tokenizer(kind, trust_remote_code, local_only)
    if for_language_model:
        _end_texts(tokenizer)
    _set_language(tokenizer, language, kind)
    _check_ends(tokenizer, kind)
    return tokenizer


def _load_tokenizer(kind: str, trust_remote_code: bool, local_only: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            kind, trust_remote_code=trust_remote_code, **({"local_files_only": True} if local_only else {})
        )
    except (*NOT_LOADED, ImportError) as error:
        trouble = hub_trouble(error, kind) or HubTrouble(f"cannot be loaded ({first_line(error)})", "correct its id")
        raise UserError(
            f"the tokenizer {kind!r} {trouble.what}",
            f"{trouble.remedy}; or name a folder that holds it, or set model.tokenizer=bytes, which needs no download",
        ) from error


def _set_language(tokenizer: Any, language: str | None, kind: str) -> None:
    """Make a multilingual tokenizer begin every target text with the code of ``language``."""
    if not hasattr(tokenizer, "tgt_lang"):
        if language:
            language_id(tokenizer, language)
        return
    if not language:
        # Without one it would mark every text as English, or fail at the first text.
        raise UserError(
            f"the tokenizer {kind!r} is multilingual, and evaluation.forced_language names no language of the texts",
            f"set evaluation.forced_language to a language such as {', '.join(list(languages_of(tokenizer))[:12])}",
        )
    language_id(tokenizer, language)
    tokenizer.tgt_lang = language.strip("_")


def _end_texts(tokenizer: Any) -> None:
    """Frame texts by an end alone; a token for padding, which is nowhere read, may be the same."""
    if tokenizer.eos_token is not None and hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_ends(tokenizer: Any, kind: str) -> None:
    """See that there is a token for padding and one that ends each text; BERT's separator serves as the latter."""
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    ids = tokenizer(text_target="a")["input_ids"]
    if tokenizer.pad_token is None or tokenizer.eos_token_id not in ids:
        missing = "padding token" if tokenizer.pad_token is None else "end-of-sentence token after a text"
        raise UserError(
            f"the tokenizer {kind!r} has no {missing}, so a model could not learn where a text ends",
            "set model.tokenizer to that of a seq2seq model, or to bytes",
        )


def text_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that every target text begins with, and those behind its end-of-sentence token.

    T5 has ``[]``, BART ``[<s>]``, and mBART-50, M2M100 and NLLB the code of the language, before the text.
    """
    ids = list(tokenizer(text_target="")["input_ids"])
    end = ids.index(tokenizer.eos_token_id)
    return ids[:end], ids[end + 1 :]


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
    """The trained model with tokens of equal score in alphabetical order; the trainer's order is random."""
    trained = json.loads(tokenizer.to_str())["model"]
    special, learnt = trained["vocab"][: len(SPECIAL_TOKENS)], trained["vocab"][len(SPECIAL_TOKENS) :]
    ordered = sorted(((token, score) for token, score in learnt), key=lambda entry: (-entry[1], entry[0]))
    return models.Unigram([*map(tuple, special), *ordered], unk_id=trained["unk_id"], byte_fallback=False)


def special_ids(tokenizer: Any) -> list[int]:
    """Ids that frame a text but are no part of it."""
    return sorted(set(tokenizer.all_special_ids))


@dataclass(frozen=True)
class UnknownCharacters:
    """What a tokenizer cannot write of a corpus."""

    characters: list[tuple[str, int]]  # each with how often it occurs, the most frequent first
    character_share: float  # of all characters but white space, 0..1
    text_share: float  # texts that hold one, 0..1

    def __str__(self) -> str:
        shown = ", ".join(f"{character} U+{ord(character):04X} ({count}x)" for character, count in self.characters[:8])
        more = f" and {len(self.characters) - 8} more" if len(self.characters) > 8 else ""
        return (
            f"the tokenizer cannot write {self.character_share:.2%} of the characters, in {self.text_share:.1%} of the "
            f"texts; the model will never say them: {shown}{more}; model.tokenizer=bytes writes everything"
        )


def find_unknown_characters(tokenizer: Any, texts: Sequence[str]) -> UnknownCharacters | None:
    """Characters that become unknown tokens; None where all can be written.

    Each distinct character is tried once, so a corpus of 100,000 texts takes a second.
    """
    unknown_id = tokenizer.unk_token_id
    counts = Counter("".join(texts))
    counts = Counter({character: count for character, count in counts.items() if not character.isspace()})
    if unknown_id is None or not counts:
        return None
    alone = tokenizer(text_target=list(counts), add_special_tokens=False)["input_ids"]
    suspects = {character for character, ids in zip(counts, alone, strict=True) if unknown_id in ids}
    if not suspects:
        return None
    # A mark that combines with a letter may be unknown only while it stands alone.
    holders = [text for text in texts if not suspects.isdisjoint(text)]
    samples = {character: text for text in reversed(holders) for character in suspects.intersection(text)}
    spoken = tokenizer(text_target=list(samples.values()), add_special_tokens=False)["input_ids"]
    unknown = {character for character, ids in zip(samples, spoken, strict=True) if unknown_id in ids}
    if not unknown:
        return None
    return UnknownCharacters(
        characters=Counter({character: counts[character] for character in unknown}).most_common(),
        character_share=sum(counts[character] for character in unknown) / counts.total(),
        text_share=sum(not unknown.isdisjoint(text) for text in holders) / len(texts),
    )
