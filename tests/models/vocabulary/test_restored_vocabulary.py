"""A trimmed vocabulary becomes whole again: rows of the source, rows that were trained, and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.vocabulary.backbones import (
    MODELS,
    TOKENS,
    Built,
    build,
    kept_ids,
    publish,
    scores,
)
from tests.models.vocabulary.makers import FAMILIES
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models.adaptation.export import export_model
from toolkit.models.loading.load import load_translator
from toolkit.models.vocabulary.restore import whole_vocabulary


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
