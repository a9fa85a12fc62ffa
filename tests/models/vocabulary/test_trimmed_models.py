"""Before training a model with a trimmed vocabulary scores the kept tokens as the full one does, however it is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
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
from tests.models.vocabulary.makers import FAMILIES, saved, texts
from tests.models.warm_start.makers import HANDS, corpus_of, inputs_of, save
from tests.process_groups import run_in_two_processes
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models import PoseProcessor, PoseTranslator
from toolkit.models.adaptation.export import export_model
from toolkit.models.architectures.separate_output import SEPARATE_OUTPUT
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loading.load import load_translator
from toolkit.models.vocabulary.restore import whole_vocabulary
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return corpus_of(folder / "corpus", HANDS, KEPT)


def same_pose_encoder(one: Built, other: Built) -> None:
    other.model.pose_encoder.load_state_dict(one.model.pose_encoder.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_kept_tokens_have_the_scores_that_they_have_among_all(
    name: str, folder: Path, corpus: Corpus, tmp_path: Path
) -> None:
    place, language = publish(name, folder), FAMILIES[MODELS[name][0]][1]
    full = build(place, corpus, language=language)
    small = build(place, corpus, "model.vocabulary=corpus", language=language)
    same_pose_encoder(full, small)
    kept = kept_ids(small.processor)
    assert len(kept) == small.model.backbone.config.vocab_size < full.model.backbone.config.vocab_size
    torch.testing.assert_close(scores(small), scores(full, kept), rtol=1e-5, atol=1e-6)

    for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        own, known = (getattr(each.model.config, key) for each in (small, full))
        assert (None if own is None else int(kept[own])) == known
    forced, known = (each.model.generation_config.forced_bos_token_id for each in (small, full))
    assert (forced is None) == (known is None) and (known is None or int(kept[forced]) == known)
    of_full = full.model.generation_config.bad_words_ids
    bad = [[int(kept[place]) for place in words] for words in small.model.generation_config.bad_words_ids]
    assert bad == [of_full[0], of_full[2]], "what cannot be written any more need not be forbidden"
    assert [int(kept[place]) for place in small.model.config.prefix_token_ids] == full.model.config.prefix_token_ids
    assert [int(kept[place]) for place in small.model.config.special_token_ids] == full.model.config.special_token_ids

    # A saved folder needs neither the source nor this toolkit's loaders.
    from transformers import AutoModel, AutoProcessor

    save(tmp_path / "saved", small)
    processor, model = (each.from_pretrained(tmp_path / "saved") for each in (AutoProcessor, AutoModel))
    assert torch.equal(scores(Built(model.eval(), processor, small.resolved)), scores(small))
    small.model.backbone.save_pretrained(tmp_path / "backbone")
    loaded = type(small.model.backbone).from_pretrained(tmp_path / "backbone")
    assert {len(each.get_input_embeddings().weight) for each in (loaded, loaded.get_decoder())} == {len(kept)}


@pytest.mark.parametrize("name", ["qwen2 tied", "llama untied"])
def test_the_words_of_a_prompt_are_kept(name: str, folder: Path, corpus: Corpus) -> None:
    """Qwen's stand in a chat template."""
    place = publish(name, folder)
    full = build(place, corpus, *PROMPT)
    small = build(place, corpus, "model.vocabulary=corpus", *PROMPT)
    same_pose_encoder(full, small)
    kept = kept_ids(small.processor)
    torch.testing.assert_close(scores(small), scores(full, kept), rtol=1e-5, atol=1e-6)
    assert len(kept) < full.model.backbone.config.vocab_size
    configs = [each.model.config for each in (small, full)]
    for key in ("prefix_token_ids", "suffix_token_ids"):
        own, known = (getattr(config, key) for config in configs)
        assert known and [int(kept[place]) for place in own] == known
    assert int(kept[configs[0].decoder_start_token_id]) == configs[1].decoder_start_token_id
    assert small.processor.tokenizer.chat_template == full.processor.tokenizer.chat_template
    # And they come back.
    whole = whole_vocabulary(small.resolved.recipe, small.model, small.processor)
    whole.give_to(small.model)
    restored = Built(small.model, whole.processor, small.resolved)
    torch.testing.assert_close(scores(restored), scores(full), rtol=1e-5, atol=1e-6)
    for key in ("prefix_token_ids", "suffix_token_ids", "decoder_start_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(small.model.config, key) == getattr(full.model.config, key), key


@pytest.mark.parametrize("name", ["t5 untied", "bart", "m2m100", "gemma tied", "llama untied"])
def test_a_full_vocabulary_comes_back_with_the_rows_of_the_source_and_those_that_were_trained(
    name: str, folder: Path, corpus: Corpus, tmp_path: Path
) -> None:
    place, language = publish(name, folder), FAMILIES[MODELS[name][0]][1]
    full = build(place, corpus, TOKENS, language=language)
    small = build(place, corpus, TOKENS, "model.vocabulary=corpus", language=language)
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.add_(0.01)  # as training does
    expected, kept = scores(small), kept_ids(small.processor)
    whole = whole_vocabulary(small.resolved.recipe, small.model, small.processor)
    table = small.model.backbone.get_input_embeddings().weight.detach().clone()
    difference = export_model(
        small.model, small.processor, tmp_path / "e", card="", dtype=None, replace=False, whole=whole
    )
    assert difference < 1e-6
    model, processor = load_translator(tmp_path / "e")
    restored = Built(model, processor, small.resolved)
    torch.testing.assert_close(scores(restored, whole.kept), expected, rtol=1e-5, atol=1e-6)
    assert processor.tokenizer.get_vocab() == full.processor.tokenizer.get_vocab()
    rows = model.backbone.get_input_embeddings().weight
    published = full.model.backbone.get_input_embeddings().weight
    trimmed_away = torch.ones(len(rows), dtype=torch.bool)
    trimmed_away[whole.kept] = False
    assert trimmed_away.any() and torch.equal(rows[trimmed_away], published[trimmed_away])
    assert torch.equal(rows[whole.kept], table)
    assert len(whole.kept) == len(kept) + 2
    generation, of_full = model.generation_config, full.model.generation_config
    for key in ("bad_words_ids", "forced_bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        assert getattr(generation, key) == getattr(of_full, key), key
    for key in ("prefix_token_ids", "special_token_ids", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        assert getattr(model.config, key) == getattr(full.model.config, key), key
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for parameter in full.model.parameters()
    )


FORMS = {
    "lora": ["model.lora.r=4"],
    "nf4": ["model.lora.r=4", "model.quantization={kind: nf4, compute_dtype: fp32}", TOKENS],
    "random": ["model.from_scratch=true"],
}


@pytest.mark.parametrize("form", FORMS)
def test_models_that_save_what_they_trained_find_the_kept_rows_again(
    form: str, folder: Path, corpus: Corpus, tmp_path: Path
) -> None:
    place = publish("t5 untied", folder)
    overrides = [*FORMS[form], *([f"model.tokenizer={place}"] if form == "random" else [])]
    full, small = (
        build(place, corpus, *overrides, f"model.vocabulary={vocabulary}") for vocabulary in ("full", "corpus")
    )
    same_pose_encoder(full, small)
    kept = kept_ids(small.processor)
    torch.testing.assert_close(scores(small)[:, : len(kept)], scores(full, kept), rtol=1e-5, atol=1e-6)
    save(tmp_path / "saved", small)
    model, processor = load_translator(tmp_path / "saved")
    assert torch.equal(scores(Built(model, processor, small.resolved)), scores(small))
    whole = whole_vocabulary(small.resolved.recipe, model, processor)
    export_model(
        model, processor, tmp_path / "e", card="", dtype=None, replace=False, merge_adapter=form == "lora", whole=whole
    )
    restored, processor = load_translator(tmp_path / "e")
    found = scores(Built(restored, processor, small.resolved), whole.kept)
    torch.testing.assert_close(found, scores(small), rtol=1e-4, atol=1e-5)


def test_rows_of_a_trained_translator_are_found_by_token(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    place = publish("t5 untied", folder)
    source = build(place, corpus)
    with torch.no_grad():
        source.model.backbone.get_input_embeddings().weight.add_(0.5)
    save(tmp_path / "source", source)
    small = build(place, corpus, "model.vocabulary=corpus", f"model.init_from={tmp_path / 'source'}")
    kept = kept_ids(small.processor)
    torch.testing.assert_close(scores(small), scores(source, kept), rtol=1e-5, atol=1e-6)
    whole = whole_vocabulary(small.resolved.recipe, small.model, small.processor)
    whole.give_to(small.model)
    restored = Built(small.model, whole.processor, small.resolved)
    torch.testing.assert_close(
        scores(restored)[:, : len(source.processor.tokenizer)], scores(source)[:, : len(source.processor.tokenizer)]
    )
    # And a trimmed translator starts another run, with all tokens or fewer.
    save(tmp_path / "trimmed", build(place, corpus, "model.vocabulary=corpus"))
    again = build(place, corpus, "model.vocabulary=corpus", f"model.init_from={tmp_path / 'trimmed'}")
    fewer = build(place, corpus, "model.vocabulary=corpus")
    trimmed = f"model.tokenizer={tmp_path / 'trimmed'}"
    with pytest.raises(UserError, match=r"model\.tokenizer=.*trimmed"):
        build(place, corpus, trimmed)
    own = build(place, corpus, trimmed, f"model.init_from={tmp_path / 'trimmed'}", "model.from_scratch=true")
    torch.testing.assert_close(scores(own), scores(fewer), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores(again), scores(fewer), rtol=1e-5, atol=1e-6)


def test_a_margin_keeps_what_is_frequent_in_a_text_file(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    place = publish("t5 untied", folder)
    (tmp_path / "more.txt").write_text("\n".join([texts()[40]] * 3 + texts()[41:60]), encoding="utf-8")
    more = f"model.vocabulary_text={tmp_path / 'more.txt'}"
    sizes = []
    for overrides in ([], [more, "model.vocabulary_margin=1"], [more, "model.vocabulary_margin=25"], [more]):
        sizes.append(len(build(place, corpus, "model.vocabulary=corpus", *overrides).processor.tokenizer))
    assert sizes[0] + 1 == sizes[1] and sizes[0] + 25 == sizes[2] < sizes[3]
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name in ("none.txt", "empty.txt", "latin.txt"):
        with pytest.raises(UserError, match=rf"model\.vocabulary_text.*{name}"):
            build(place, corpus, "model.vocabulary=corpus", f"model.vocabulary_text={tmp_path / name}")


def test_a_tokenizer_that_changed_does_not_bring_its_rows_back(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    place = publish("t5 tied", folder)
    small = build(place, corpus, "model.vocabulary=corpus")
    recipe = small.resolved.recipe
    other = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"tokenizer": str(publish("bart", folder))})}
    )
    with pytest.raises(UserError, match="another"):
        whole_vocabulary(other, small.model, small.processor)
    full = build(place, corpus)
    with pytest.raises(UserError, match="full"):
        whole_vocabulary(full.resolved.recipe, full.model, full.processor)


@pytest.mark.process
def test_partitioned_tables_are_trimmed_as_whole_ones_are(folder: Path, corpus: Corpus) -> None:
    place = publish("t5 untied", folder)
    for name, overrides in {"full": [], "nf4": FORMS["nf4"]}.items():
        small = build(place, corpus, "model.vocabulary=corpus", *overrides)
        torch.save(_tables(small.model), folder / f"{name} tables")
    run_in_two_processes(_partitioned, folder)


def _partitioned(rank: int, folder: Path) -> None:
    corpus = Corpus.open(folder / "corpus")
    for name, overrides in {"full": [], "nf4": FORMS["nf4"]}.items():
        small = build(folder / "t5 untied", corpus, "model.vocabulary=corpus", *overrides, ds="zero3", ranks=2)
        assert any(hasattr(parameter, "ds_id") for parameter in small.model.backbone.parameters())
        found, expected = _tables(small.model), torch.load(folder / f"{name} tables")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)


def _tables(model: PoseTranslator) -> dict[str, Tensor]:
    import deepspeed

    tables = {
        "shared": model.backbone.get_input_embeddings().weight,
        "head": model.backbone.get_output_embeddings().weight,
    }
    tables |= {name: parameter for name, parameter in model.named_parameters() if "new_rows" in name}
    values = {}
    for name, parameter in tables.items():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            values[name] = parameter.detach().clone()
    return values


assert toolkit.auto is not None  # its import registers the model
