"""How many parameters a backbone has, from its published dimensions alone: no weights, no memory, no hub."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from toolkit.recipe.model_cards import ModelCard


def count_parameters(card: ModelCard) -> int:
    """The parameters of the backbone that ``card`` describes, tied ones counted once; the pose encoder comes on top."""
    return _count(card.architecture, json.dumps(card.config, sort_keys=True))


@lru_cache(maxsize=64)
def _count(architecture: str, config_json: str) -> int:
    config = AutoConfig.for_model(architecture, **json.loads(config_json))
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())
