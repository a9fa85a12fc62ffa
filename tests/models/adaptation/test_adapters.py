"""What trains and what does not, over the families of backbones; each trainable tensor gets a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    GPT2Config,
    LEDConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    PegasusConfig,
    PreTrainedConfig,
    T5Config,
    UMT5Config,
)

from toolkit.errors import UserError
from toolkit.models import PoseTranslator, PoseTranslatorConfig
from toolkit.models.adaptation.adapters import adapt, unreached_parameters
from toolkit.recipe.sections.model import Model

T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 1}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
MARIAN = BART | {"decoder_vocab_size": 96, "pad_token_id": 95, "decoder_start_token_id": 95}
LED = {key: value for key, value in BART.items() if key != "max_position_embeddings"} | {"attention_window": 4}
BERT = BertConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
).to_dict()
GPT2 = GPT2Config(
    vocab_size=96, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2, is_decoder=True
).to_dict() | {"add_cross_attention": True}

# Configuration, and the names of the layers that get adapters when the recipe names none.
FAMILIES: dict[str, tuple[PreTrainedConfig, set[str]]] = {
    "t5": (T5Config(**T5), {"q", "v"}),
    "t5-v1.1": (T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), {"q", "v"}),
    "umt5": (UMT5Config(**T5), {"q", "v"}),
    "longt5": (LongT5Config(**T5, encoder_attention_type="transient-global", global_block_size=4), {"q", "v"}),
    "bart": (BartConfig(**BART), {"q_proj", "v_proj"}),
    "bart, untied": (BartConfig(**BART, tie_word_embeddings=False), {"q_proj", "v_proj"}),
    "mbart": (MBartConfig(**BART), {"q_proj", "v_proj"}),
    "m2m100": (M2M100Config(**BART), {"q_proj", "v_proj"}),
    "pegasus": (PegasusConfig(**BART), {"q_proj", "v_proj"}),
    "marian": (MarianConfig(**MARIAN), {"q_proj", "v_proj"}),
    "led": (LEDConfig(**LED), {"q_proj", "v_proj", "query", "value"}),
    "bert+gpt2": (
        EncoderDecoderConfig(encoder=BERT, decoder=GPT2, pad_token_id=0, decoder_start_token_id=1, eos_token_id=2),
        {"query", "value", "c_attn", "q_attn"},
    ),
}


def make(family: str = "t5", *, checkpointing: bool = False, prefix: tuple[int, ...] = ()) -> PoseTranslator:
    torch.manual_seed(0)
    encoder = {"kind": "conv", "hidden": 24, "layers": 1, "kernel": 3, "stride": 2, "dropout": 0.0, "positions": True}
    backbone = AutoModelForSeq2SeqLM.from_config(FAMILIES[family][0])
    config = PoseTranslatorConfig(
        backbone=backbone.config.to_dict(),
        pose_encoder=encoder,
        num_points=5,
        num_channels=3,
        ctc=True,
        prefix_token_ids=list(prefix),
    )
    model = PoseTranslator(config, backbone)
    if checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def settings(**values: object) -> Model:
    return Model(backbone="demo", **values)


def clip() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "poses": torch.randn(2, 16, 5, 3, generator=generator),
        "visible": torch.ones(2, 16, 5, dtype=torch.bool),
        "frame_mask": torch.ones(2, 16, dtype=torch.bool),
        "labels": torch.randint(3, 90, (2, 6), generator=generator),
    }


def learn(model: PoseTranslator, steps: int = 1) -> list[float]:
    """Plain steps on one batch; the gradients of the last one stay."""
    batch = clip()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        output = model(**batch)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
        loss = loss + output.ctc_logits.square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        if step < steps - 1:
            optimizer.step()
    return losses


def trained(model: PoseTranslator) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_found_and_every_trainable_tensor_gets_a_gradient(family: str) -> None:
    model = make(family)
    adapt(model, settings(lora={"r": 2, "dropout": 0.0}))
    names = trained(model)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    assert adapted == FAMILIES[family][1]
    others = {name.split(".")[0] for name in names if ".lora_" not in name}
    assert others == {"pose_encoder", "ctc_head"}, "in full: what starts from random weights, and nothing else"
    losses = learn(model, 5)
    assert losses[-1] < losses[0]
    # A is multiplied by B, which starts at zero: after one step both have learnt something.
    dead = [name for name, parameter in names.items() if parameter.grad is None or not parameter.grad.abs().sum()]
    assert not dead
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [(), (5, 6)])
def test_without_lora_all_that_the_forward_pass_reaches_trains(family: str, prefix: tuple[int, ...]) -> None:
    model = make(family, prefix=prefix)
    never = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}  # sinusoids
    idle = {name for name, _ in unreached_parameters(model)}
    adapt(model, settings())
    learn(model)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert without == frozen == idle | never
    assert bool(idle) == (family in ("bart, untied", "led", "bert+gpt2"))


@pytest.mark.parametrize("family", ["t5", "bart", "bert+gpt2"])
def test_checkpointing_loses_no_gradient_of_an_encoders_adapters(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make(family, checkpointing=checkpointing)
        adapt(model, settings(lora={"r": 2, "dropout": 0.0}))
        learn(model)
        encoder = {name: p for name, p in trained(model).items() if "lora_B" in name and ".encoder." in name}
        assert encoder and all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.values())
        gradients.append({name: p.grad for name, p in trained(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("lora", "kinds"),
    [
        ({"train": ["layer_norms"]}, {"layer_norm"}),
        ({"train": ["embeddings"]}, {"shared"}),
        ({"train": ["layer_norms", "embeddings"]}, {"layer_norm", "shared"}),
        ({"dora": True}, {"lora_magnitude_vector"}),
        ({"rslora": True}, set()),
    ],
)
def test_what_trains_besides(lora: dict[str, object], kinds: set[str]) -> None:
    model = make()
    adapt(model, settings(lora={"r": 4, "alpha": 8, "dropout": 0.0, **lora}))
    names = {name for name in trained(model) if name.startswith("backbone.") and ".lora_A." not in name}
    rest = {name for name in names if ".lora_B." not in name}
    assert rest and all(any(kind in name for kind in kinds) for name in rest) if kinds else not rest
    assert all(any(kind in name for name in rest) for kind in kinds)
    layer = model.get_submodule("backbone.encoder.block.0.layer.0.SelfAttention.q")
    assert layer.scaling["default"] == (8 / 4**0.5 if lora.get("rslora") else 2.0)
    losses = learn(model, 3)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in trained(model).values())


@torch.no_grad()
def test_an_adapter_starts_as_nothing_and_always_the_same() -> None:
    plain = make().eval()
    expected = plain(**clip()).logits
    weights = []
    for draws in (0, 3):
        model = make()
        torch.rand(draws)  # whatever was drawn before, for instance by a rank that made no weights of its own
        adapt(model, settings(lora={"r": 2}))
        assert torch.equal(model.eval()(**clip()).logits, expected)
        weights.append(torch.cat([p.flatten() for name, p in trained(model).items() if "lora_A" in name]))
    assert torch.equal(*weights) and weights[0].std() > 0


def test_targets_by_name() -> None:
    model = make()
    adapt(model, settings(lora={"targets": ["SelfAttention.k", "wo"]}))
    adapted = {name.split(".lora_")[0] for name in trained(model) if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"k", "wo"}
    assert not any("EncDecAttention" in name for name in adapted)
    model = make("bert+gpt2")
    adapt(model, settings(lora={"targets": ["all-linear"]}))
    adapted = {name.split(".lora_")[0] for name in trained(model) if ".lora_" in name}
    assert "backbone.decoder.lm_head" not in adapted and "backbone.encoder.pooler.dense" not in adapted
    assert len(adapted) == 13
    learn(model)
    assert all(parameter.grad is not None for parameter in trained(model).values())


@pytest.mark.parametrize("target", ["q_proj", "output"])  # `output` is the pose encoder's, never a target
def test_a_target_that_matches_nothing_is_named_with_the_nearest(target: str) -> None:
    with pytest.raises(UserError, match=rf"model\.lora\.targets: .*{target}") as caught:
        adapt(make(), settings(lora={"targets": [target]}))
    assert any(near in caught.value.hint for near in (" q,", " o,"))


@pytest.mark.parametrize(("family", "table"), [("t5", "shared"), ("bart", "model.shared"), ("bert+gpt2", "wte")])
@pytest.mark.parametrize("part", ["lm_head", "all of them"])
def test_an_adapter_of_a_tied_output_is_refused(family: str, table: str, part: str) -> None:
    """Merging it would change the embeddings, too."""
    targets = ["lm_head"] if part == "lm_head" else ["lm_head", *FAMILIES[family][1]]
    with pytest.raises(UserError, match=rf"model\.lora\.targets: .*lm_head .*{table}"):
        adapt(make(family), settings(lora={"targets": targets}))


def test_an_adapter_of_a_layer_that_is_used_twice_is_refused() -> None:
    model = make("bart")
    first = model.backbone.model.encoder.layers[0].self_attn
    first.k_proj = first.q_proj
    with pytest.raises(UserError, match=r"self_attn\.q_proj .*self_attn\.k_proj"):
        adapt(model, settings(lora={"r": 2}))


def test_an_untied_output_can_have_an_adapter() -> None:
    model = make("bart, untied")
    adapt(model, settings(lora={"r": 2, "dropout": 0.0, "targets": ["lm_head"]}))
    assert {name.split(".lora_")[0] for name in trained(model) if ".lora_" in name} == {"backbone.lm_head"}
    losses = learn(model, 3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        (["encoder"], {"encoder"}),
        (["decoder"], {"decoder"}),
        (["embeddings"], {"shared"}),
        (["encoder", "decoder", "embeddings"], {"encoder", "decoder", "shared"}),
    ],
)
def test_frozen_parts(parts: list[str], frozen: set[str]) -> None:
    model = make()
    adapt(model, settings(freeze=parts))
    still = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == frozen
    learn(model)
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_generation_runs_with_adapters(translator: Callable[..., PoseTranslator]) -> None:
    model = translator()
    adapt(model, settings(lora={"r": 2}))
    batch = {key: value for key, value in clip().items() if key != "labels"}
    batch["poses"], batch["visible"] = torch.randn(2, 16, 50, 3), torch.ones(2, 16, 50, dtype=torch.bool)
    assert model.generate(**batch, num_beams=3, max_new_tokens=4).shape[0] == 2
