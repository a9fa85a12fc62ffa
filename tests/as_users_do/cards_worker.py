"""One rank of test_cards.py: loads one card's published model after another, and writes down what came of it.

It runs in a user's clone, by whose cards and toolkit it goes.
"""

from __future__ import annotations

import gc
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed

from tests.as_users_do.published import FORMS
from tests.rank_workers import joined
from toolkit.checkpointing.random_states import seed_everything
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_translator
from toolkit.models.check import check_model
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.loading.weights import whole_state_dict
from toolkit.recipe.model_cards import load_model_yaml
from toolkit.recipe.resolve import resolve_named
from toolkit.training.run import make_processor

STRATEGIES = ("zero1", "zero3")  # whole on each rank, and partitioned over both


def main() -> None:
    with joined() as worker:
        corpus, hub = Corpus.open(worker.plan["corpus"]), Path(worker.plan["hub"])
        outcomes: dict[str, Any] = {}
        for card in map(load_model_yaml, FORMS):
            for ds in STRATEGIES:
                try:
                    outcomes[f"{card.name} {ds}"] = load(card.name, ds, corpus, hub / str(card.hub_id), worker.ranks)
                except Exception:  # an error of a card is that card's result
                    outcomes[f"{card.name} {ds}"] = {"error": traceback.format_exc()}
                gc.collect()
        worker.write(outcomes)


def load(name: str, ds: str, corpus: Corpus, published: Path, ranks: Ranks) -> dict[str, Any]:
    overrides = [f"model.backbone={name}", f"data.corpus={corpus.path}", f"run.dir=runs/cards/{name}_{ds}"]
    resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=False, ds=ds)
    check_model(resolved)
    seed_everything(resolved.recipe.training.seed)
    if ranks.is_main:
        resolved.run_dir.mkdir(parents=True)
    tokenizer = make_processor(resolved, ranks, corpus).tokenizer
    model = build_translator(resolved, corpus, tokenizer)
    is_partitioned = all(hasattr(parameter, "ds_id") for parameter in model.backbone.parameters())
    found, expected = whole_state_dict(model, keep=True), weights_in(published)
    names = {f"backbone.{name}" for name, _ in model.backbone.named_parameters()}
    differing = [
        name
        for name in names
        if not torch.equal(found[name], expected[published_name(name, expected)].to(TORCH_DTYPES[resolved.precision]))
    ]
    ids = tokenizer(text_target="good day")["input_ids"]
    return {
        "partitioned": is_partitioned,
        "differing": everywhere(differing),
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "unknown": tokenizer.unk_token_id in ids,
        "forced": model.generation_config.forced_bos_token_id,
        "beams": model.generation_config.num_beams,
    }


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All that the published files hold, by the names that it has there."""
    if (folder / "pytorch_model.bin").is_file():
        return dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def published_name(name: str, published: dict[str, Tensor]) -> str:
    """What a parameter of a translator is called in published files."""
    name = name.removeprefix("backbone.")
    return name if name in published else name.replace(".text_model", "")  # as T5Gemma 2's encoder was written


def everywhere(names: list[str]) -> list[str]:
    """The names that any rank has."""
    all_names: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(all_names, names)
    return sorted({name for names in all_names for name in names})


if __name__ == "__main__":
    main()
