"""What a backbone cannot do is one line, before any weights are read; what was published is what the card says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MT5Config,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
)

from toolkit.errors import UserError
from toolkit.models import backbone_config as backbone_configs
from toolkit.models.backbone import backbone_class, empty_backbone, new_backbone, note_published, position_limit
from toolkit.models.backbone_config import backbone_config
from toolkit.models.check import check_model, check_positions, encoder_positions
from toolkit.recipe.load import load_recipe
from toolkit.recipe.model_cards import ModelCard, load_model_yaml
from toolkit.recipe.resolve import ResolvedRun, resolve_named

BODY = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
SMALL_BART = BartConfig(
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    max_position_embeddings=600,
)


def resolve(*overrides: str) -> ResolvedRun:
    return resolve_named("t5_small", list(overrides), 1, has_gpu=True, needs_data=False)


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as refusal:
        check_model(resolve(*overrides))
    assert "\n" not in refusal.value.message
    return refusal.value


@pytest.mark.parametrize("config", [GPT2Config(n_embd=8, n_layer=1, n_head=1), WhisperConfig(d_model=16)])
def test_what_does_not_write_text_from_text(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    error = refused(f"model.backbone={tmp_path}")
    assert f"model.backbone={tmp_path} is a {config.model_type}" in error.message and "recipes.py ls" in error.hint


def test_an_encoder_that_reads_words_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None) -> Any: ...

    SMALL_BART.save_pretrained(tmp_path)
    encoder = type(empty_backbone(SMALL_BART).get_encoder())
    monkeypatch.setattr(encoder, "forward", forward)
    error = refused(f"model.backbone={tmp_path}")
    assert "bart" in error.message and "inputs_embeds" in error.message


def test_code_from_elsewhere_runs_only_when_allowed(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForSeq2SeqLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('it ran')")
    assert "model.trust_remote_code=true" in refused(f"model.backbone={tmp_path}").hint


def test_a_hub_model_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    error = refused("model.backbone=t5_3b")
    assert str(tmp_path / "cache") in error.message and "HF_HUB_OFFLINE" in error.message
    for part in ("HF_HOME", "models--google-t5--t5-3b", "model.backbone=FOLDER", "from_scratch"):
        assert part in error.hint


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert f"model.backbone={tmp_path}: " in refused(f"model.backbone={tmp_path}").message


def test_an_adapter_that_cannot_be_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    SMALL_BART.save_pretrained(tmp_path)
    here = f"model.backbone={tmp_path}"
    check_model(resolve(here, "model.lora.targets=[q_proj]", "data.max_frames=600"))
    assert "'query'" in refused(here, "model.lora.targets=[query]").message
    assert "lm_head" in refused(here, "model.lora.targets=[lm_head]").message


def test_fp16_with_a_t5_of_the_hub_is_found_out_here(tmp_path: Path) -> None:
    MT5Config(**BODY).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="overflow"):
        check_model(resolve(f"model.backbone={tmp_path}", "ds.bf16.enabled=false", "ds.fp16.enabled=true"))


def test_more_frames_than_positions(tmp_path: Path) -> None:
    SMALL_BART.save_pretrained(tmp_path)
    here = f"model.backbone={tmp_path}"
    check_model(resolve(here, "data.max_frames=1200", "model.pose_encoder.stride=2"))
    error = refused(here, "data.max_frames=1201", "model.pose_encoder.stride=2")
    assert all(f" {number} " in f"{error.message} " for number in (600, 1201, 601))
    assert "data.max_frames=1200" in error.hint
    hint = refused(here, "data.max_frames=601", "model.pose_encoder=linear").hint
    assert "data.max_frames=600" in hint and "model.pose_encoder=conv" in hint


def test_features_behind_the_poses_take_as_many_positions_again() -> None:
    backbone, clips = empty_backbone(SMALL_BART), ("data.poses=poses", "model.pose_encoder.stride=2")
    for settings, fitting in (
        (("data.features=features", "model.fusion=concat"), 600),
        (("data.features=features", "model.fusion=sum"), 1200),
        (("model.fusion=concat",), 1200),
    ):
        recipe = load_recipe("t5_small", [*clips, *settings])
        check_positions(recipe, backbone, fitting, prefix=0)
        with pytest.raises(UserError) as refusal:
            check_positions(recipe, backbone, fitting + 1, prefix=0)
        assert f"data.max_frames={fitting}" in refusal.value.hint


def test_a_prefix_takes_positions_too() -> None:
    recipe = load_recipe("t5_small", ["model.pose_encoder.stride=2"])
    backbone = empty_backbone(SMALL_BART)
    check_positions(recipe, backbone, 1180, prefix=10)
    with pytest.raises(UserError, match=r"prefix of 11 tokens take 601") as refusal:
        check_positions(recipe, backbone, 1180, prefix=11)
    assert "data.max_frames=1178" in refusal.value.hint


def test_a_prefix_that_names_conditions_may_take_all_of_its_tokens(tmp_path: Path) -> None:
    SMALL_BART.save_pretrained(tmp_path)
    prefixed = (f"model.backbone={tmp_path}", "model.pose_encoder.stride=2", "model.prefix='{language}:'")
    check_model(resolve(*prefixed, "data.max_frames=1180", "model.max_prefix_tokens=10"))
    assert "a prefix of 11 tokens" in refused(*prefixed, "data.max_frames=1180", "model.max_prefix_tokens=11").message


def test_more_tokens_than_positions(tmp_path: Path) -> None:
    SMALL_BART.save_pretrained(tmp_path)
    here = f"model.backbone={tmp_path}"
    error = refused(here, "evaluation.max_new_tokens=601")
    assert "600" in error.message and "601" in error.message
    assert error.hint == "set evaluation.max_new_tokens=600"
    assert refused(here, "training.max_target_tokens=999").hint == "set training.max_target_tokens=600"
    BartConfig(**{**SMALL_BART.to_dict(), "max_position_embeddings": 100}).save_pretrained(tmp_path)
    error = refused(here, "data.max_frames=99")
    assert error.hint == "set training.max_target_tokens=100 evaluation.max_new_tokens=100"


SMALL_LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
)


def test_prompt_poses_and_text_share_the_context_of_a_language_model(tmp_path: Path) -> None:
    SMALL_LLAMA.save_pretrained(tmp_path)
    here = (f"model.backbone={tmp_path}", "model.pose_encoder.stride=2", "training.max_target_tokens=100")
    # 383 positions of poses, one start token, 128 tokens of text.
    check_model(resolve(*here, "data.max_frames=766"))
    error = refused(*here, "data.max_frames=768")
    assert all(f" {number} " in f"{error.message} " for number in (512, 768, 128, 513))
    assert "data.max_frames=766" in error.hint
    prefixed = ("model.prompt='{language}: {poses}'", "model.max_prefix_tokens=11")
    assert "data.max_frames=744" in refused(*here, *prefixed, "data.max_frames=766").hint


def test_what_a_language_model_lacks(tmp_path: Path) -> None:
    SMALL_LLAMA.save_pretrained(tmp_path)
    here = f"model.backbone={tmp_path}"
    error = refused(here, "model.freeze=[encoder]")
    assert "encoder" in error.message and "llama" in error.message
    check_model(resolve(here, "model.freeze=[decoder]", "data.max_frames=400"))
    assert "model.prefix" in refused("model.from_scratch=true", "model.prompt=translate {poses}").hint


@pytest.mark.parametrize("tiny", ["true", "false"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2_vl", "bert", "mamba"])
def test_other_models_without_an_encoder_are_refused(kind: str, tiny: str, tmp_path: Path) -> None:
    """Also where a small version is asked for, of which there is none."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    error = refused(f"model.backbone={tmp_path}", f"model.tiny={tiny}")
    assert f"is a {kind}" in error.message and "llama" in error.message


# BART: two rows of the table are not positions. T5: relative. M2M100: computed for any length.
LIMITS = {
    **dict.fromkeys(("bart_large", "mbart50", "pegasus_large", "transformer"), (1024, 1024)),
    **{"marian": (512, 512), "led_base": (16384, 1024)},
    **dict.fromkeys(("t5_small", "mt5_base", "umt5_base", "longt5_base", "m2m100", "nllb_600m"), (None, None)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_positions_are_read_from_the_model(name: str) -> None:
    backbone = empty_backbone(
        backbone_config(load_recipe("t5_small", [f"model.backbone={name}", "model.tiny=true"]).model)
    )
    shrunk = 1024 if name == "led_base" else LIMITS[name][0]
    assert (position_limit(backbone.get_encoder()), position_limit(backbone.get_decoder())) == (shrunk, LIMITS[name][1])


def test_the_pose_encoder_shortens() -> None:
    for kind, expected in (("linear", 301), ("conv", 151)):
        settings = load_recipe("t5_small", [f"model.pose_encoder.kind={kind}"]).model.pose_encoder
        assert encoder_positions(settings, 301) == expected


@pytest.fixture
def carded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModelCard]:
    """Let the card t5_small mean a folder with the configuration that the card describes, but for some values."""

    def carded(**others: Any) -> ModelCard:
        card = load_model_yaml("t5_small")
        T5Config(**{**card.config, **others}).save_pretrained(tmp_path / "published")
        own = card.model_copy(update={"hub_id": str(tmp_path / "published")})
        monkeypatch.setattr(backbone_configs, "card_of", lambda _: own)
        return own

    return carded


def test_a_published_model_has_the_dimensions_of_its_card(carded: Callable[..., ModelCard]) -> None:
    carded()
    assert backbone_config(load_recipe("t5_small", []).model).d_model == 512


@pytest.mark.parametrize(("key", "value"), [("d_model", 640), ("num_heads", 9), ("vocab_size", 32100)])
def test_another_dimension_is_named_with_both_values(key: str, value: int, carded: Callable[..., ModelCard]) -> None:
    card = carded(**{key: value})
    message = refused().message
    assert f"{key}: {card.config[key]} on the card, {value} found" in message
    assert "published" in message


@pytest.mark.parametrize("architecture", ["t5", "mt5", "umt5"])
def test_an_output_matrix_of_its_own_stays_one(architecture: str, tmp_path: Path) -> None:
    published = {**BODY, "tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(architecture, **published)
    note_published(config, published)
    torch.manual_seed(0)
    model = new_backbone(config).eval()
    model.tie_weights()
    assert model.lm_head.weight is not model.shared.weight
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    ids = torch.tensor([[0, 5]])
    with torch.no_grad():
        states = model.decoder(ids, encoder_hidden_states=torch.ones(1, 3, 16)).last_hidden_state
        logits = model(encoder_outputs=(torch.ones(1, 3, 16),), decoder_input_ids=ids).logits
    # Unscaled, and yet near zero at first.
    torch.testing.assert_close(logits, model.lm_head(states))
    assert logits.std() < 3

    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    loaded = backbone_class(again).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.shared.weight, model.shared.weight)


def test_a_published_configuration_says_so(tmp_path: Path) -> None:
    T5Config(**BODY).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    here = load_recipe("t5_small", [f"model.backbone={tmp_path}"]).model
    assert backbone_class(backbone_config(here)) is T5ForConditionalGeneration
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    assert backbone_class(backbone_config(here)) is not T5ForConditionalGeneration
