"""What holds of encoder-decoders holds of a language model: starting from another run, averages, frozen parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.models.warm_start.makers import HANDS, Made, corpus_of, inputs_of, make, save, scores_of, train
from toolkit.corpus.packed import Corpus
from toolkit.training.optimization.averaging import averaged_weights, update_average
from toolkit.training.optimization.freezing import BackboneFreeze

# Its output is tied to its token table.
QWEN = ("model.backbone=qwen2_5_0_5b", "model.prefix=say:")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("language model") / "corpus", HANDS)


@pytest.mark.parametrize("adapter", [(), ("model.lora.r=4", "model.lora.dropout=0")], ids=["whole", "lora"])
def test_a_run_starts_from_a_trained_one(adapter: tuple[str, ...], corpus: Corpus, tmp_path: Path) -> None:
    source = make(corpus, *QWEN, *adapter)
    untrained = scores_of(source.model, HANDS)
    train(source.model, inputs_of(HANDS), 3)
    folder = save(tmp_path / "source", source)
    taken = make(corpus, *QWEN, f"model.init_from={folder}", seed=9)
    assert not torch.allclose(scores_of(source.model, HANDS), untrained, atol=1e-3)
    torch.testing.assert_close(scores_of(taken.model, HANDS), scores_of(source.model, HANDS), rtol=1e-5, atol=1e-5)
    fresh = make(corpus, *QWEN, f"model.init_from={folder}", "model.init_parts=[pose_encoder]", seed=9).model
    for name, values in fresh.backbone.state_dict().items():
        same = torch.equal(values, source.model.backbone.state_dict().get(name, values))
        assert same or not adapter or "lora" not in name
    assert not torch.allclose(scores_of(fresh, HANDS), scores_of(source.model, HANDS), atol=1e-3)


def test_the_average_of_tied_weights_translates_and_gives_them_back(corpus: Corpus) -> None:
    made = make(corpus, *QWEN)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=3e-3)
    engine = SimpleNamespace(module=made.model, optimizer=optimizer, basic_optimizer=optimizer)
    table, sums = made.model.get_input_embeddings(), None
    for number in range(1, 4):
        made.model(**inputs_of(HANDS)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_average(engine, 0.5, number)
        decay, weight = min(0.5, (1 + number) / (10 + number)), table.weight.detach().clone()
        sums = weight if sums is None else decay * sums + (1 - decay) * weight
    trained, last = scores_of(made.model, HANDS), table.weight.detach().clone()
    with averaged_weights(engine):
        torch.testing.assert_close(table.weight.detach(), sums)
        assert made.model.backbone.get_output_embeddings().weight is table.weight
        assert not torch.equal(scores_of(made.model, HANDS), trained)
    assert torch.equal(table.weight, last) and torch.equal(scores_of(made.model, HANDS), trained)


PARTS = {
    "decoder": lambda name: "embed_tokens" in name,
    "embeddings": lambda name: "embed_tokens" not in name,
}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parts_stay_as_they_are(part: str, corpus: Corpus) -> None:
    """The tied output is of the embeddings."""
    made = make(corpus, *QWEN, f"model.freeze=[{part}]")
    before = {name: values.detach().clone() for name, values in made.model.named_parameters()}
    train(made.model, inputs_of(HANDS), 2)
    for name, values in made.model.named_parameters():
        trains = not name.startswith("backbone.") or PARTS[part](name)
        assert torch.equal(values, before[name]) != trains, name


def test_a_backbone_that_is_frozen_at_first_changes_after_it_thaws(corpus: Corpus) -> None:
    made: Made = make(corpus, *QWEN)
    groups = [
        {"params": list(made.model.pose_encoder.parameters()), "name": "fresh"},
        {"params": list(made.model.backbone.parameters()), "name": "backbone", "lr": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    engine = SimpleNamespace(module=made.model, optimizer=optimizer, basic_optimizer=optimizer)

    def step() -> None:
        made.model(**inputs_of(HANDS)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    table, freeze = made.model.get_input_embeddings().weight, BackboneFreeze(made.model)
    before = table.detach().clone()
    step()
    assert torch.equal(table, before) and not optimizer.state[table]["exp_avg"].any()
    freeze.thaw(engine)
    groups[1]["lr"] = optimizer.param_groups[1]["lr"] = 3e-3
    step()
    assert not torch.equal(table, before)
