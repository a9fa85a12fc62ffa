"""From a recipe to a translator: which weights, which vocabulary, which dropout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedConfig, T5ForConditionalGeneration

from tests.small_runs import still_corpus
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models import PoseTranslator
from toolkit.models.build import build_processor, build_translator
from toolkit.models.check import check_model
from toolkit.models.tokenizers import make_tokenizer
from toolkit.recipe.resolve import ResolvedRun, resolve_named


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return still_corpus(tmp_path / "corpus", "good day", "good night")


@pytest.fixture
def resolve() -> Callable[..., ResolvedRun]:
    def resolve(*overrides: str, recipe: str = "t5_small") -> ResolvedRun:
        return resolve_named(recipe, list(overrides), 1, has_gpu=True, needs_data=False)

    return resolve


@pytest.fixture
def folder(tmp_path: Path, backbones: dict[str, PreTrainedConfig]) -> Path:
    """A backbone with weights and tokenizer, as somebody may have it on disk."""
    torch.manual_seed(3)
    path = tmp_path / "backbone"
    T5ForConditionalGeneration(backbones["t5"]).save_pretrained(path)
    make_tokenizer("bytes").save_pretrained(path)
    return path


def test_a_folder_gives_its_weights(folder: Path, corpus: Corpus, resolve: Callable[..., ResolvedRun]) -> None:
    resolved = resolve(f"model.backbone={folder}", "ds.bf16.enabled=false")
    check_model(resolved)
    processor = build_processor(resolved.recipe, corpus)
    model = build_translator(resolved, corpus, processor.tokenizer)
    expected = T5ForConditionalGeneration.from_pretrained(folder).state_dict()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert processor.feature_extractor.fps == 10.0
    model.save_pretrained(folder.parent / "saved")
    assert str(folder) not in (folder.parent / "saved" / "config.json").read_text()


def test_from_scratch_the_same_seed_gives_the_same_weights(
    folder: Path, corpus: Corpus, resolve: Callable[..., ResolvedRun]
) -> None:
    tokenizer = make_tokenizer("bytes")
    models = []
    for seed in (1, 1, 2):
        resolved = resolve(f"model.backbone={folder}", "model.from_scratch=true", f"training.seed={seed}")
        torch.manual_seed(seed)
        models.append(build_translator(resolved, corpus, tokenizer).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["backbone.shared.weight"], models[2]["backbone.shared.weight"])


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_random_weights_speak_the_vocabulary_of_the_tokenizer(
    tokenizer: str, corpus: Corpus, resolve: Callable[..., ResolvedRun]
) -> None:
    resolved = resolve("model.from_scratch=true", "model.tiny=true", f"model.tokenizer={tokenizer}")
    processor = build_processor(resolved.recipe, corpus)
    model = build_translator(resolved, corpus, processor.tokenizer)
    assert model.backbone.config.vocab_size == len(processor.tokenizer)
    assert model.config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.decoder_start_token_id == processor.tokenizer.pad_token_id


def test_dropout_and_search_are_the_recipes(corpus: Corpus, resolve: Callable[..., ResolvedRun]) -> None:
    resolved = resolve(
        *("model.from_scratch=true", "model.tiny=true", "model.dropout=0.25", "model.prefix=translate to English:"),
        *(
            "evaluation.num_beams=3",
            "evaluation.max_new_tokens=17",
            "training.ctc_weight=0.5",
            "evaluation.ctc_weight=0.2",
        ),
    )
    tokenizer = make_tokenizer("bytes")
    model = build_translator(resolved, corpus, tokenizer)
    assert {module.p for module in model.backbone.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    assert (model.generation_config.num_beams, model.generation_config.max_new_tokens) == (3, 17)
    assert model.config.ctc and model.config.ctc_search_weight == 0.2
    assert tokenizer.decode(model.config.prefix_token_ids) == "translate to English:"


@pytest.mark.parametrize("beams", [1, 4])
def test_any_search_can_be_saved(
    beams: int, tmp_path: Path, corpus: Corpus, resolve: Callable[..., ResolvedRun]
) -> None:
    resolved = resolve(
        *("model.from_scratch=true", "model.tiny=true"),
        *(f"evaluation.num_beams={beams}", "evaluation.length_penalty=0", "evaluation.no_repeat_ngram_size=3"),
    )
    build_translator(resolved, corpus, make_tokenizer("bytes")).save_pretrained(tmp_path / "saved")
    assert PoseTranslator.from_pretrained(tmp_path / "saved").generation_config.num_beams == beams


def test_an_encoder_is_refused_before_any_weights_are_loaded(
    tmp_path: Path, resolve: Callable[..., ResolvedRun]
) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **shape)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"bert.*encoder-decoder") as refusal:
        check_model(resolve(f"model.backbone={tmp_path / 'bert'}"))
    assert "\n" not in str(refusal.value)
