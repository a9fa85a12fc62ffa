"""Tiny models under the ids of the real ones, in the forms in which those were published, and a clone that knows them.

Each card's architecture is shrunk to two narrow layers, gets a tokenizer of its own family that was trained on a word
list, and is written as its publisher did: safetensors, whole or in shards, or ``pytorch_model.bin`` alone; files of
SentencePiece, ``tokenizer.json``, or both. The clone's model cards say the tiny dimensions, because the toolkit holds a
published configuration to its card.

What this hides: weights that were really trained, and tokenizers of real size. The weights are made by the toolkit's
own reading of a configuration: an output matrix that it wrongly took for a separate one would be one here, too.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    M2M100Tokenizer,
    NllbTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from toolkit.corpus.demo import words
from toolkit.models.backbone import new_backbone, note_published
from toolkit.recipe.model_cards import ModelCard, load_model_yaml, model_names, tiny_config
from toolkit.recipe.yaml_text import dump_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[2]
CLONED = ("ds_configs", "launch", "recipes", "toolkit")
SUBWORDS = 200
SHARD = "200KB"  # small enough to split a tiny model into several
ROWS = 8  # the rows of embeddings are a multiple of this, more than the tokenizer's tokens, as in published models


@dataclass(frozen=True)
class Form:
    """How a model was published.

    Attributes:
        weights: ``safetensors``, ``shards`` of it, or ``bin`` (``pytorch_model.bin`` alone).
        tokenizer: writes the tokenizer's files into a folder.
        fast: whether ``tokenizer.json`` lies beside them.
        generation: what ``generation_config.json`` says besides the ids of tokens.
    """

    weights: str
    tokenizer: Callable[[Path], None]
    fast: bool = False
    generation: tuple[tuple[str, Any], ...] = ()


@cache
def subwords(**settings: Any) -> bytes:
    """A SentencePiece model of the word list."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_writer=model,
        vocab_size=SUBWORDS,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def t5_subwords() -> bytes:
    return subwords(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def t5(folder: Path) -> None:
    (folder / "spiece.model").write_bytes(t5_subwords())
    echo(folder, tokenizer_class="T5Tokenizer", model_max_length=512)


def mt5(folder: Path) -> None:
    (folder / "spiece.model").write_bytes(t5_subwords())
    echo(folder, tokenizer_class="T5Tokenizer", extra_ids=0, additional_special_tokens=None)


def umt5(folder: Path) -> None:
    mt5(folder)
    T5Tokenizer.from_pretrained(folder).save_pretrained(folder)


def byt5(folder: Path) -> None:
    echo(folder, tokenizer_class="ByT5Tokenizer", extra_ids=125)


def bart(folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(words(), vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(folder))
    echo(folder, tokenizer_class="BartTokenizer", model_max_length=1024)


def mbart50(folder: Path) -> None:
    (folder / "sentencepiece.bpe.model").write_bytes(subwords())
    echo(folder, tokenizer_class="MBart50Tokenizer", src_lang=None, tgt_lang=None, language_codes="ML50")


def nllb(folder: Path) -> None:
    vocabulary = [*SPECIAL, "▁", *sorted(set("".join(words())))]
    NllbTokenizer(vocab=numbered(vocabulary), merges=[]).save_pretrained(folder)


def m2m100(folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=subwords())
    found = [model.id_to_piece(number) for number in range(3, model.vocab_size())]
    files = {"vocab_file": folder / "vocab.json", "spm_file": folder / "sentencepiece.bpe.model"}
    files["vocab_file"].write_text(json.dumps(numbered([*SPECIAL, *found])))
    files["spm_file"].write_bytes(subwords())
    names = {key: str(path) for key, path in files.items()}
    codes = [f"__{code}__" for code in M2M100Tokenizer(**names).lang_code_to_token]
    M2M100Tokenizer(**names, additional_special_tokens=codes).save_pretrained(folder)


def pegasus(folder: Path) -> None:
    masks = ["<mask_1>", "<mask_2>", *(f"<unk_{number}>" for number in range(2, 103))]
    model = subwords(pad_id=0, eos_id=1, unk_id=105, bos_id=-1, user_defined_symbols=tuple(masks))
    (folder / "spiece.model").write_bytes(model)
    echo(folder, tokenizer_class="PegasusTokenizer")


def marian(folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=subwords())
    found = [model.id_to_piece(number) for number in range(3, model.vocab_size())]
    (folder / "vocab.json").write_text(json.dumps(numbered(["</s>", "<unk>", *found, "<pad>"])))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(subwords())
    echo(folder, tokenizer_class="MarianTokenizer", source_lang="de", target_lang="en")


def qwen(folder: Path) -> None:
    """No token begins a text; one ends documents and pads."""
    byte_level(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    echo(folder, tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token=None)


def llama3(folder: Path) -> None:
    """A token begins every text, none ends it, and none pads."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    backend = byte_level(folder, [begin, end])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end).save_pretrained(folder)


def byte_level(folder: Path, special: list[str]) -> Tokenizer:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(words(), vocab_size=400, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    return trained._tokenizer


def mistral(folder: Path) -> None:
    vocabulary = ["<unk>", "<s>", "</s>", "▁", *sorted(set("".join(words())))]
    LlamaTokenizer(vocab=numbered(vocabulary), merges=[], add_bos_token=True).save_pretrained(folder)


def gemma(folder: Path) -> None:
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *sorted(set("".join(words())))]
    GemmaTokenizer(vocab=numbered(vocabulary), merges=[], add_bos_token=True).save_pretrained(folder)


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
# Of language models one of each architecture and tokenizer, and those that have a recipe.
FORMS = {
    "t5_small": Form("safetensors", t5, fast=True),
    "t5_base": Form("safetensors", t5, fast=True),
    "t5_large": Form("safetensors", t5, fast=True),
    "t5_3b": Form("shards", t5, fast=True),
    "t5_v1_1_base": Form("bin", t5),
    "flan_t5_base": Form("safetensors", t5, fast=True),
    "byt5_small": Form("bin", byt5),
    "mt5_base": Form("bin", mt5),
    "mt5_large": Form("shards", mt5),
    "umt5_base": Form("bin", umt5, fast=True),
    "longt5_base": Form("bin", t5, fast=True),
    "bart_large": Form("safetensors", bart, fast=True, generation=(("num_beams", 4), ("early_stopping", True))),
    "led_base": Form("bin", bart, generation=(("max_length", 20),)),
    "mbart50": Form("bin", mbart50, generation=(("max_length", 200), ("num_beams", 5))),
    "m2m100": Form("bin", m2m100, generation=(("max_length", 200), ("early_stopping", True))),
    "nllb_600m": Form("bin", nllb, fast=True, generation=(("max_length", 200),)),
    "pegasus_large": Form("bin", pegasus, generation=(("length_penalty", 0.8), ("num_beams", 8), ("max_length", 256))),
    "qwen2_5_0_5b": Form("safetensors", qwen, fast=True),
    "qwen2_5_7b": Form("shards", qwen, fast=True),
    "qwen2_5_14b": Form("shards", qwen, fast=True),
    "qwen3_0_6b": Form("safetensors", qwen, fast=True),
    "llama3_1_8b": Form("shards", llama3, fast=True, generation=(("do_sample", True), ("temperature", 0.6))),
    "mistral_7b": Form("shards", mistral, fast=True),
    "gemma2_2b": Form("shards", gemma, fast=True),
    "gemma_7b": Form("shards", gemma, fast=True),
    "t5gemma_2b_2b": Form("shards", gemma, fast=True),
    "t5gemma2_270m": Form("safetensors", gemma, fast=True),
    "marian": Form("bin", marian, generation=(("num_beams", 6), ("max_length", 512))),
}


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def echo(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def publish(hub: Path, clone: Path) -> None:
    """Write every model of the clone's cards into the hub's folder, and its dimensions into the card."""
    for name in model_names():
        path = clone / "recipes" / "models" / f"{name}.yaml"
        card = load_model_yaml(name)
        if name == "demo":
            continue  # published nowhere, and small as it is
        config, parameters = publish_model(card, FORMS[name], hub) if name in FORMS else shrink(card)
        tree, _ = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        path.write_text(dump_yaml({**tree, "config": config, "parameters": parameters}), encoding="utf-8")


def publish_model(card: ModelCard, form: Form, hub: Path) -> tuple[dict[str, Any], int]:
    """One model; its configuration as its card has to say it, and its number of parameters."""
    assert card.hub_id
    folder = hub / card.hub_id
    folder.mkdir(parents=True)
    form.tokenizer(folder)
    values = tiny_config(card.architecture, card.config)
    (folder / "config.json").write_text(json.dumps({**values, "model_type": card.architecture}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if form.fast:
        tokenizer.save_pretrained(folder)
    else:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    fit(values, tokenizer)
    model = backbone(card, values)
    about = {"architectures": [type(model).__name__], "model_type": card.architecture, **values}
    write_weights(model, form.weights, folder)
    (folder / "config.json").write_text(json.dumps(about, indent=2))
    ids = {key: value for key, value in values.items() if key.endswith("_token_id")}
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, **ids, **dict(form.generation)})
    )
    return values, count(model)


def shrink(card: ModelCard) -> tuple[dict[str, Any], int]:
    """A card without a published model."""
    values = tiny_config(card.architecture, card.config)
    return values, count(backbone(card, values))


def fit(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a configuration a row for every token; Marian's padding is its last one."""
    padding_is_last = "vocab_size" in values and values.get("pad_token_id") == values["vocab_size"] - 1
    rows = len(tokenizer) if padding_is_last else (len(tokenizer) // ROWS + 1) * ROWS
    encoder = values.get("encoder", {})
    for part in (values, encoder, encoder.get("text_config", {}), values.get("decoder", {})):
        if "vocab_size" in part:
            part["vocab_size"] = rows
    if padding_is_last:
        values["pad_token_id"] = values["decoder_start_token_id"] = rows - 1


def backbone(card: ModelCard, values: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(card.architecture, **values)
    note_published(config, values)
    torch.manual_seed(0)
    return new_backbone(config)


def count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def write_weights(model: PreTrainedModel, form: str, folder: Path) -> None:
    if form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size=SHARD if form == "shards" else "5GB")


def clone_repository(folder: Path) -> Path:
    """What a user's clone holds, as far as training needs it."""
    for name in CLONED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
