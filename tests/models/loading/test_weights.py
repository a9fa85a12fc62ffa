"""A model takes its weights back from the folder that it wrote, into whatever form it trains in, or says why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.process_groups import group_of_one
from tests.small_runs import still_corpus
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.models import PoseTranslator
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loading.weights import load_weights, save_model, saved_state_dict
from toolkit.recipe.resolve import resolve_named

TOKENS = "model.extra_tokens=['<loc>', '<per>']"
# Recipe and what is asked of it.
MODELS = {
    "tied tables": ("t5_small", []),
    "other names": ("bart_large", []),
    "buffers": ("t5_small", ["model.pose_encoder={kind: conformer, hidden: 16, heads: 2}"]),
    "rows in their table": ("t5_small", [TOKENS]),
    "rows apart": ("t5_small", [TOKENS, "model.freeze=[embeddings]"]),
    "rows apart, other names": ("bart_large", [TOKENS, "model.freeze=[embeddings]"]),
    "adapters": ("t5_small", [TOKENS, "model.lora.r=4"]),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return still_corpus(tmp_path_factory.mktemp("c") / "corpus", "good day", "good day")


@pytest.fixture(scope="module")
def saved(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PoseTranslator, Path]]:
    """A model that has changed since it was made, and its folder."""
    made: dict[str, tuple[PoseTranslator, Path]] = {}

    def saved(name: str) -> tuple[PoseTranslator, Path]:
        if name not in made:
            recipe, wishes = MODELS[name]
            settings = ["model.tiny=true", "model.tokenizer=bytes", "ds.bf16.enabled=false", *wishes]
            resolved = resolve_named(recipe, settings, 1, has_gpu=False, ds="zero1", needs_data=False)
            processor = build_processor(resolved.recipe, corpus)
            model = build_translator(resolved, corpus, processor.tokenizer)
            shake(model)
            folder = tmp_path_factory.mktemp("model") / "best"
            save_model(folder, model, processor, saved_state_dict(model, keep=True))
            made[name] = model, folder
        return made[name]

    return saved


@torch.no_grad()
def shake(model: PoseTranslator) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(1)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_again_what_it_was(saved: Callable[..., Any], name: str) -> None:
    model, folder = saved(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    shake(model)
    load_weights(folder, model)
    after = model.state_dict()
    kept = before.keys() if not model.base else saved_state_dict(model, keep=True).keys()
    assert [key for key in kept if not torch.equal(after[key], before[key])] == []


@pytest.mark.parametrize("name", ["tied tables", "adapters"])
def test_weights_are_as_readable_as_the_rest(saved: Callable[..., Any], name: str) -> None:
    files = [path for path in saved(name)[1].rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1


@pytest.mark.parametrize("name", ["tied tables", "adapters"])
def test_a_folder_that_is_not_whole_is_refused(saved: Callable[..., Any], name: str, tmp_path: Path) -> None:
    model, folder = saved(name)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    file = next(iter(damaged.glob("*.safetensors")))
    tensors = load_file(file)
    lost = next(key for key in tensors if key.startswith("pose_encoder"))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"missing: {lost}"):
        load_weights(damaged, model)
    save_file(tensors | {"stranger_0": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="unexpected: stranger_0"):
        load_weights(damaged, model)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=str(tmp_path)):
        load_weights(damaged, model)
