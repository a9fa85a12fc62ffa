"""A translator whose weights are partitioned over the ranks while they are read: no rank ever holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from toolkit.cluster.devices import own_device
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.loading.backbone_weights import Placement, fill_skeleton, place_added_modules
from toolkit.models.loading.base_model import read_base
from toolkit.models.loading.hub import fetch_weights
from toolkit.models.loading.load import find_model, load_adapted
from toolkit.models.loading.random_weights import make_skeleton
from toolkit.models.loading.weights import saved_weights
from toolkit.models.translator import PoseTranslator


def load_partitioned(name: str | Path, zero3: dict[str, Any]) -> PoseTranslator:
    """Load a translator, in evaluation mode, in the form that DeepSpeed's stage 3 gives it; all ranks call this.

    Rank 0 reads one weight of the backbone after the other; each rank keeps its partition. The pose encoder, a small
    part of a model, stays whole until DeepSpeed gets it.

    Raises:
        UserError: there is no such model, or its folder is not complete.
    """
    source = find_model(name)
    if base := read_base(Path(source)):
        return load_adapted(Path(source), base, zero3)[0]
    folder = fetch_weights(source) or Path(source)
    config = PoseTranslatorConfig.from_pretrained(source)
    placement = Placement(config.dtype or torch.float32, own_device(), zero3)
    skeleton = make_skeleton(config.backbone_config())
    model = PoseTranslator(config, skeleton.model)
    read = saved_weights(folder, model)
    tensors = model.state_dict(keep_vars=True)

    def read_backbone(name: str, tensor: Tensor) -> Tensor:
        full_name = f"backbone.{name}"
        # Buffers that follow from the configuration are in no file.
        return read(full_name) if full_name in tensors else skeleton.draw(tensor, name, seed=0)

    fill_skeleton(skeleton, read_backbone, placement)
    with torch.no_grad():
        for full_name, tensor in tensors.items():
            if not full_name.startswith("backbone."):
                tensor.copy_(read(full_name))
    place_added_modules(model, placement)
    model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()
