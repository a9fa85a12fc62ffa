"""Before training a model with a trimmed vocabulary scores the kept tokens as the full one does, however it is held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.vocabulary.backbones import (
    FORMS,
    MODELS,
    PROMPT,
    Built,
    build,
    kept_ids,
    publish,
    same_pose_encoder,
    scores,
)
from tests.models.vocabulary.makers import FAMILIES, texts
from tests.models.warm_start.makers import save
from tests.process_groups import run_in_two_processes
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models import PoseTranslator
from toolkit.models.adaptation.export import export_model
from toolkit.models.loading.load import load_translator
from toolkit.models.vocabulary.restore import whole_vocabulary


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
