"""How many parameters a backbone has, from its published dimensions alone: no weights, no memory, no hub."""

from __future__ import annotations

import json
from functools import lru_cache

from transformers import AutoConfig

from toolkit.models.backbone import empty_backbone, note_output_matrix
from toolkit.recipe.model_cards import ModelCard


def count_parameters(card: ModelCard) -> int:
    """The parameters of the backbone that ``card`` describes, tied ones counted once; the pose encoder comes on top."""
    return _count(card.architecture, json.dumps(card.config, sort_keys=True))


@lru_cache(maxsize=64)
def _count(architecture: str, config_json: str) -> int:
    values = json.loads(config_json)
    config = AutoConfig.for_model(architecture, **values)
    note_output_matrix(config, values)
    return sum(parameter.numel() for parameter in empty_backbone(config).parameters())
