"""New tokens: their rows train, frozen tables or not, and no other row changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BartConfig, ByT5Tokenizer, PreTrainedConfig, T5Config

from toolkit.errors import UserError
from toolkit.models import PoseTranslator, PoseTranslatorConfig
from toolkit.models.adaptation.adapters import adapt, token_tables
from toolkit.models.adaptation.extra_tokens import add_rows, add_tokens, fold_rows, reserve_rows, widened
from toolkit.models.tokenizers import special_ids, train_tokenizer
from toolkit.recipe.sections.model import Model

TOKENS = ["<loc>", "<per>"]
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 1, "decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tied": T5Config(vocab_size=384, **T5),
    "rows to spare": T5Config(vocab_size=400, **T5),  # T5 is published with more rows than its tokenizer has tokens
    "untied": BartConfig(vocab_size=384, **BART, tie_word_embeddings=False),
    "scaled, with a bias": BartConfig(vocab_size=384, **BART, scale_embedding=True),
}
FROZEN = {
    "lora": {"lora": {"r": 2, "dropout": 0.0}},
    "frozen": {"freeze": ["embeddings"]},
}
IN_FULL = {"everything": {}, "lora and embeddings": {"lora": {"r": 2, "dropout": 0.0, "train": ["embeddings"]}}}


def tokenizer() -> ByT5Tokenizer:
    made = ByT5Tokenizer()
    add_tokens(made, TOKENS)
    return made


def make(kind: str, prefix: tuple[int, ...] = (), **values: object) -> PoseTranslator:
    torch.manual_seed(0)
    settings = Model(backbone="demo", extra_tokens=TOKENS, **values)
    config = CONFIGS[kind].__class__.from_dict(CONFIGS[kind].to_dict())
    reserve_rows(config, tokenizer(), TOKENS)
    backbone = AutoModelForSeq2SeqLM.from_config(config)
    encoder = {"kind": "linear", "hidden": 24, "layers": 1, "kernel": 3, "stride": 2, "dropout": 0.0, "positions": True}
    outer = PoseTranslatorConfig(
        backbone=config.to_dict(), pose_encoder=encoder, num_points=5, num_channels=3, prefix_token_ids=list(prefix)
    )
    model = PoseTranslator(outer, backbone)
    add_rows(model, settings, tokenizer())
    adapt(model, settings)
    return model.eval()  # without dropout


def clip(*tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "poses": torch.randn(1, 16, 5, 3, generator=generator),
        "visible": torch.ones(1, 16, 5, dtype=torch.bool),
        "frame_mask": torch.ones(1, 16, dtype=torch.bool),
        "labels": torch.tensor([tokens]),
    }


def learn(model: PoseTranslator) -> None:
    batch = clip(100, 384, 101, 385, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()


def tables(model: PoseTranslator) -> list[Tensor]:
    """Whole token tables, as an exported model has them."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names = {name for name, p in model.named_parameters() if any(p is table.weight for table in token_tables(model))}
    fold_rows(model, weights)
    assert not any(name.startswith("new_rows") for name in weights)
    return [weights[name] for name in sorted(names)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("values", FROZEN.values(), ids=FROZEN)
def test_in_frozen_tables_the_new_rows_train_and_no_other(kind: str, values: dict[str, object]) -> None:
    model = make(kind, **values)
    before = tables(model)
    assert len(before) == (2 if kind == "untied" else 1)
    for table in before:
        mean = table[:384].mean(dim=0)
        torch.testing.assert_close(table[384:386], mean.expand(2, -1))
    learn(model)
    for old, new in zip(before, tables(model), strict=True):
        assert (old[384:386] != new[384:386]).any(dim=1).all()
        assert torch.equal(old[:384], new[:384]) and torch.equal(old[386:], new[386:])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("values", IN_FULL.values(), ids=IN_FULL)
def test_in_tables_that_train_nothing_is_kept_apart(kind: str, values: dict[str, object]) -> None:
    model = make(kind, **values)
    assert not any("new_rows" in name for name, _ in model.named_parameters())
    before = tables(model)
    torch.testing.assert_close(before[0][384], before[0][:384].mean(dim=0))
    learn(model)
    for old, new in zip(before, tables(model), strict=True):
        changed = (old != new).any(dim=1)
        assert changed[384:386].all() and changed[[100, 101]].all()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("prefix", [(), (384, 100)])
@torch.no_grad()
def test_kept_apart_they_answer_as_rows_of_the_table_would(kind: str, prefix: tuple[int, ...]) -> None:
    model = make(kind, prefix, **FROZEN["lora"])
    for rows in model.new_rows.values():
        rows.weight.add_(torch.randn(rows.weight.shape))
    plain = make(kind, prefix)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_rows(model, whole)
    plain.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in whole.items() if "lora" not in name}
    )
    batch = clip(100, 385, 101, 384, 384, 1)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
    poses = {key: value for key, value in batch.items() if key != "labels"}
    assert torch.equal(
        model.generate(**poses, num_beams=3, max_new_tokens=6), plain.generate(**poses, num_beams=3, max_new_tokens=6)
    )


def test_tokens_that_are_known_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.extra_tokens.*<pad>"):
        add_tokens(ByT5Tokenizer(), ["<pad>", "<loc>"])


@pytest.mark.parametrize(
    "made", [ByT5Tokenizer(), train_tokenizer(["hands and faces", "and hands"] * 3)], ids=["bytes", "trained"]
)
def test_tokens_stand_for_themselves_and_do_not_read_as_text(made, tmp_path) -> None:
    size = len(made)
    add_tokens(made, TOKENS)
    made.save_pretrained(tmp_path)
    for known in (made, type(made).from_pretrained(tmp_path)):
        assert known.convert_tokens_to_ids(TOKENS) == [size, size + 1]
        assert size in known("and<loc>and")["input_ids"]
        assert "<loc>" not in known.decode([size], skip_special_tokens=True)
        assert {size, size + 1} <= set(special_ids(known))


def test_published_tables_get_zeros_for_rows_that_they_lack() -> None:
    for values, like in ((torch.ones(3, 2), torch.empty(5, 2)), (torch.ones(1, 3), torch.empty(1, 5))):
        wide = widened(values, like)
        assert (
            wide.shape == like.shape
            and wide.sum() == values.sum()
            and torch.equal(wide[: len(values), : values.shape[1]], values)
        )
    assert widened(values, values) is values
