"""Configurations of small backbones, and of small translators around them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from toolkit.models import PoseTranslatorConfig

# As keywords for T5Config, and for BartConfig; a test overrides what it needs otherwise.
T5: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
POSE_ENCODER: dict[str, Any] = {
    "kind": "conv",
    "hidden": 24,
    "layers": 2,
    "kernel": 5,
    "stride": 2,
    "dropout": 0.0,
    "positions": True,
}


def translator_config(backbone: PreTrainedConfig, **settings: Any) -> PoseTranslatorConfig:
    """The configuration of a translator of hands_body_50 whose tokenizer is that of bytes."""
    settings = {"pose_encoder": POSE_ENCODER, "num_points": 50, "special_token_ids": [0, 1, 2], **settings}
    return PoseTranslatorConfig(backbone=backbone.to_dict(), **settings)
