"""Small backbones of each architecture with tokenizers of their families, and translators as a run builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import toolkit.auto
from tests.models.vocabulary.makers import saved, texts
from tests.models.warm_start.makers import HANDS, inputs_of
from toolkit.corpus.packed import Corpus
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.architectures.separate_output import SEPARATE_OUTPUT
from toolkit.models.build import build_processor, build_translator
from toolkit.models.vocabulary.trimming import trimming_of
from toolkit.models.warm_start.filling import WarmStart
from toolkit.models.warm_start.plan import make_plan
from toolkit.models.warm_start.source import read_source
from toolkit.recipe.resolve import ResolvedRun, resolve_named

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "decoder_start_token_id": 0}
BODY = {
    "d_model": 16,
    **{f"{half}_layers": 1 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 16 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
}
STACK = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _untied(rows: int, _: Any) -> Any:
    return SEPARATE_OUTPUT["t5"](T5Config(vocab_size=rows, tie_word_embeddings=False, **T5))


def _bart(rows: int, _: Any) -> Any:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=rows, forced_eos_token_id=2, **ids, **BODY))


def _marian(rows: int, tokenizer: Any) -> Any:
    pad = tokenizer.pad_token_id
    return MarianMTModel(
        MarianConfig(vocab_size=rows, pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad, **BODY)
    )


def _causal(model: Any, config: Any, **settings: Any) -> Callable[[int, Any], Any]:
    def make(rows: int, tokenizer: Any) -> Any:
        roles = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {role: getattr(tokenizer, role) for role in roles}
        return model(config(vocab_size=rows, **{**STACK, **ids, **settings}))

    return make


def _t5gemma(rows: int, tokenizer: Any) -> Any:
    half = {"vocab_size": rows, "head_dim": 8, "query_pre_attn_scalar": 8, **STACK}
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=half, decoder=half, vocab_size=rows))


# Backbone and its tokenizer's family; tables have more rows than there are tokens, as T5's and M2M100's.
MODELS: dict[str, tuple[str, Callable[[int, Any], Any]]] = {
    "t5 tied": ("t5", lambda rows, _: T5ForConditionalGeneration(T5Config(vocab_size=rows, **T5))),
    "t5 untied": ("t5", _untied),
    "t5 with bytes": ("unigram with bytes", _untied),
    "bart": ("bart", _bart),
    "mbart50": (
        "mbart50",
        lambda rows, _: MBartForConditionalGeneration(
            MBartConfig(vocab_size=rows, decoder_start_token_id=2, scale_embedding=True, **BODY)
        ),
    ),
    "nllb": ("nllb", lambda rows, _: M2M100ForConditionalGeneration(M2M100Config(vocab_size=rows, **BODY))),
    "m2m100": ("m2m100", lambda rows, _: M2M100ForConditionalGeneration(M2M100Config(vocab_size=rows, **BODY))),
    "pegasus": (
        "pegasus",
        lambda rows, _: PegasusForConditionalGeneration(PegasusConfig(vocab_size=rows, pad_token_id=0, **BODY)),
    ),
    "marian": ("marian", _marian),
    "qwen2 tied": ("qwen", _causal(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)),
    "llama untied": ("llama3", _causal(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False)),
    "mistral untied": ("mistral", _causal(MistralForCausalLM, MistralConfig, tie_word_embeddings=False)),
    "gemma tied": ("gemma", _causal(GemmaForCausalLM, GemmaConfig, head_dim=8)),
    "t5gemma": ("gemma", _t5gemma),
}
PROMPT = ("model.prefix=null", "model.prompt=ba del {poses} fo gri:")
KEPT = texts()[:12]
TOKENS = "model.extra_tokens=['<loc>', '<per>']"


@dataclass(frozen=True)
class Built:
    model: PoseTranslator
    processor: PoseProcessor
    resolved: ResolvedRun


def publish(name: str, folder: Path) -> Path:
    """A backbone's folder, as the hub has it."""
    family, make = MODELS[name]
    place = folder / name
    if not place.exists():
        tokenizer = AutoTokenizer.from_pretrained(saved(family, folder / "tokenizers"))
        torch.manual_seed(3)
        model = make(len(tokenizer) + 6, tokenizer)
        if (bias := getattr(model, "final_logits_bias", None)) is not None:
            bias.normal_()
        forbidden = [place for text in KEPT[:1] for place in tokenizer(text)["input_ids"][1:3]]
        absent = tokenizer.convert_tokens_to_ids(_absent(tokenizer))
        model.generation_config = GenerationConfig(
            **{**model.generation_config.to_dict(), "bad_words_ids": [[forbidden[0]], [absent], forbidden]}
        )
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def _absent(tokenizer: Any) -> str:
    """A subword that the kept texts do not need."""
    used = "".join(token for text in KEPT for token in tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))
    subwords = sorted(
        tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - {*tokenizer.all_special_tokens}
    )
    return next(subword for subword in subwords if len(subword) > 3 and subword not in used and subword[0] not in "<>_")


def build(
    folder: Path, corpus: Corpus, *overrides: str, language: str | None = None, ds: str = "zero2", ranks: int = 1
) -> Built:
    """A translator as a run builds it."""
    settings = [
        *(f"model.backbone={folder}", "ds.bf16.enabled=false", "ds.torch_autocast.enabled=false", "model.dropout=0"),
        *("model.pose_encoder={kind: conv, hidden: 16, dropout: 0}", "model.prefix=ba del:", "training.ctc_weight=0.1"),
        *([f"evaluation.forced_language={language}"] if language else []),
        *overrides,
    ]
    resolved = resolve_named("t5_small", settings, ranks, has_gpu=False, ds=ds, needs_data=False)
    processor = build_processor(resolved.recipe, corpus)
    start = None
    if resolved.recipe.model.init_from:
        source = read_source(resolved.recipe.model.init_from)
        plan = make_plan(source, resolved.recipe, corpus.landmark_set, corpus.metadata.fps, processor.tokenizer)
        start = WarmStart(plan)
    torch.manual_seed(5)
    return Built(build_translator(resolved, corpus, processor.tokenizer, start).eval(), processor, resolved)


def kept_ids(processor: PoseProcessor) -> Tensor:
    trimming = trimming_of(processor.tokenizer)
    assert trimming is not None
    return torch.tensor(trimming.kept)


@torch.no_grad()
def scores(built: Built, ids: Tensor | None = None, text: str = KEPT[3]) -> Tensor:
    """Scores of the next tokens of a text [tokens, vocabulary], or of these tokens of it."""
    batch = {key: value[:1] for key, value in inputs_of(HANDS).items() if key != "labels"}
    labels = torch.tensor([built.processor.tokenizer(text_target=text)["input_ids"]])
    logits = built.model(**batch, labels=labels).logits[0]
    return logits if ids is None else logits[:, ids]


def same_pose_encoder(one: Built, other: Built) -> None:
    other.model.pose_encoder.load_state_dict(one.model.pose_encoder.state_dict())


FORMS = {
    "lora": ["model.lora.r=4"],
    "nf4": ["model.lora.r=4", "model.quantization={kind: nf4, compute_dtype: fp32}", TOKENS],
    "random": ["model.from_scratch=true"],
}


assert toolkit.auto is not None  # its import registers the model
