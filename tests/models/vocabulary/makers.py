"""Full tokenizers of each family, learnt from made-up Hindi-like and English texts, and corpora of such texts."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaTokenizer,
    LlamaTokenizer,
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    NllbTokenizer,
    PegasusTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LATIN = ["ba", "del", "fo", "gri", "hu", "ja", "kle", "mi", "no", "pra", "qui", "rost", "su", "ti", "vex", "wy", "zo"]
HINDI = ["कि", "ता", "ब", "मे", "रा", "ना", "स्कू", "ल", "पा", "नी", "घ", "र", "दो", "स्त", "है", "यह", "औ"]


@cache
def texts(count: int = 1500, seed: int = 0) -> list[str]:
    """Texts of words of syllables, half of them in each script."""
    draw = random.Random(seed)
    words = [["".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(400)] for parts in (LATIN, HINDI)]
    return [
        " ".join(draw.choices(words[number % 2], k=draw.randint(2, 9))) + draw.choice(".!?।,")
        for number in range(count)
    ]


@cache
def spm(kind: str, **settings: Any) -> bytes:
    """A SentencePiece model of the texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=model,
        model_type=kind,
        vocab_size=500,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def numbered(words: Sequence[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def learnt(kind: str = "unigram") -> list[tuple[str, float]]:
    """Subwords that a model has learnt, with their scores."""
    model = sentencepiece.SentencePieceProcessor(model_proto=spm(kind))
    return [(model.id_to_piece(place), model.get_score(place)) for place in range(3, model.vocab_size())]


def t5(_: Path) -> Any:
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *learnt()], extra_ids=10)


def unigram_with_bytes(_: Path) -> Any:
    """As UMT5's: a unigram model whose unknown characters become bytes."""
    subwords = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram([*subwords, *learnt()], unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return ending(tokenizer)


def ending(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose texts end in ``</s>``."""
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def bpe_with_bytes(_: Path) -> Any:
    """As Llama's: byte-pair encoding of whole texts whose unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(split=False)])
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(texts(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no added tokens
    return ending(Tokenizer.from_str(json.dumps(content)))


def bart(_: Path) -> Any:
    tokenizer = ByteLevelBPETokenizer()
    special = [*SPECIAL, "<mask>"]
    tokenizer.train_from_iterator(texts(), vocab_size=900, special_tokens=special, show_progress=False)
    content = json.loads(tokenizer.to_str())["model"]
    return RobertaTokenizer(vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]])


def mbart50(_: Path) -> Any:
    return MBart50Tokenizer(vocab=[("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *learnt()])


def pegasus(_: Path) -> Any:
    masks = ["<mask_1>", "<mask_2>", *(f"<unk_{number}>" for number in range(2, 103))]
    special = [("<pad>", 0.0), ("</s>", 0.0), *((mask, 0.0) for mask in masks), ("<unk>", 0.0)]
    return PegasusTokenizer(vocab=[*special, *learnt()])


def nllb(_: Path) -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    content = json.loads(tokenizer.to_str())["model"]
    return NllbTokenizer(vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]])


def m2m100(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"vocab_file": folder / "vocab.json", "spm_file": folder / "sentencepiece.bpe.model"}
    files["vocab_file"].write_text(json.dumps(numbered([*SPECIAL, *(subword for subword, _ in learnt("bpe"))])))
    files["spm_file"].write_bytes(spm("bpe"))
    names = {key: str(path) for key, path in files.items()}
    codes = [f"__{code}__" for code in M2M100Tokenizer(**names).lang_code_to_token]
    return M2M100Tokenizer(**names, additional_special_tokens=codes)


def marian(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    words = numbered(["</s>", "<unk>", ">>hin<<", *(subword for subword, _ in learnt()), "<pad>"])
    (folder / "vocab.json").write_text(json.dumps(words))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(spm("unigram"))
    places = {"source_spm": "source.spm", "target_spm": "target.spm", "vocab": "vocab.json"}
    return MarianTokenizer(**{key: str(folder / name) for key, name in places.items()})


def byte_level(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level tokenizer of the texts."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts(), vocab_size=900, special_tokens=list(special), show_progress=False)
    content = json.loads(tokenizer.to_str())["model"]
    return content["vocab"], [tuple(pair) for pair in content["merges"]]


def qwen(_: Path) -> Any:
    """No token begins a text; one ends documents and pads; a chat stands between two others."""
    end, turn, turn_end = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    vocabulary, merges = byte_level([end, turn, turn_end])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token=end, pad_token=end, unk_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": [turn, turn_end]})
    message = f"{turn}{{{{ message.role }}}}\n{{{{ message.content }}}}{turn_end}\n"
    tokenizer.chat_template = f"{{% for message in messages %}}{message}{{% endfor %}}{turn}assistant\n"
    return tokenizer


def llama3(_: Path) -> Any:
    """A token begins every text, none ends it, and none pads; a word that is a token is not merged together."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    vocabulary, merges = byte_level([begin, end])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens([begin, end])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def with_bytes(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer of whole texts whose unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    kept = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=kept, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(texts(), trainer)
    content = json.loads(tokenizer.to_str())["model"]
    return content["vocab"], [tuple(pair) for pair in content["merges"]]


def mistral(_: Path) -> Any:
    vocabulary, merges = with_bytes(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def gemma(_: Path) -> Any:
    vocabulary, merges = with_bytes(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


FAMILIES: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "t5": (t5, None),
    "unigram with bytes": (unigram_with_bytes, None),
    "bpe with bytes": (bpe_with_bytes, None),
    "bart": (bart, None),
    "mbart50": (mbart50, "hi_IN"),
    "pegasus": (pegasus, None),
    "nllb": (nllb, "hin_Deva"),
    "m2m100": (m2m100, "hi"),
    "marian": (marian, None),
    "qwen": (qwen, None),
    "llama3": (llama3, None),
    "mistral": (mistral, None),
    "gemma": (gemma, None),
}
OF_LANGUAGE_MODELS = ("qwen", "llama3", "mistral", "gemma")


@cache
def saved(name: str, folder: Path) -> Path:
    """The folder of a full tokenizer."""
    make, _ = FAMILIES[name]
    place = folder / name
    make(folder / f"{name} files").save_pretrained(place)
    return place
