"""T5Gemma 2 without the half that sees pictures: what reads and writes texts, under its published names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2Decoder,
    T5Gemma2Encoder,
    T5Gemma2LMHead,
    T5Gemma2Model,
    T5Gemma2PreTrainedModel,
    T5Gemma2TextEncoder,
)

# transformers does not initialise modules without weights of their own in a model of another package: `__module__`
# says that these are initialised as its own.
_PLACE = T5Gemma2ForConditionalGeneration.__module__
_TIED = {"decoder.embed_tokens.weight": "encoder.text_model.embed_tokens.weight"}
_NOT_READ = ["vision_tower", "multi_modal_projector", "eoi_embedding"]


class _Words(nn.Embedding):
    """The token table, whose vectors are multiplied by ``sqrt(width)``.

    transformers' has a vector apart for the token that ends a picture, which no text holds; to find it in a batch the
    host would wait for a GPU.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_scale = config.hidden_size**0.5

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [..., width] of token ids [...]."""
        # Rounded to the type of the weights, as in transformers.
        return super().forward(ids) * torch.tensor(self.embed_scale, dtype=self.weight.dtype)


class _Encoder(T5Gemma2Encoder):
    __module__ = _PLACE

    def __init__(self, config: Any) -> None:
        T5Gemma2PreTrainedModel.__init__(self, config)
        self.text_model = T5Gemma2TextEncoder._from_config(config.text_config)
        self.text_model.embed_tokens = _Words(config.text_config)
        self.post_init()


class _Model(T5Gemma2Model):
    __module__ = _PLACE
    _tied_weights_keys = _TIED

    def __init__(self, config: Any) -> None:
        T5Gemma2PreTrainedModel.__init__(self, config)
        self.encoder = _Encoder(config.encoder)
        self.decoder = T5Gemma2Decoder(config.decoder)
        self.decoder.embed_tokens = _Words(config.decoder)
        self.post_init()


class T5Gemma2WithoutVision(T5Gemma2ForConditionalGeneration):
    """Encoder, decoder and output; what published files hold besides is not read."""

    __module__ = _PLACE
    _keys_to_ignore_on_load_unexpected = _NOT_READ

    def __init__(self, config: Any) -> None:
        T5Gemma2PreTrainedModel.__init__(self, config)
        self.model = _Model(config)
        self.vocab_size = config.decoder.vocab_size
        self.lm_head = T5Gemma2LMHead(config.decoder.hidden_size, self.vocab_size)
        self.loss_type = "ForMaskedLM"
        self.post_init()
