"""The trained translator that a run starts from: where it is, what it is, and its weights one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from toolkit.errors import UserError, first_line
from toolkit.models.backbone import empty_backbone
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.loading.base_model import read_base
from toolkit.models.loading.hub import NOT_LOADED, HubTrouble, fetch_weights, hub_trouble
from toolkit.models.loading.load import INTACT_COPY, fetch_translator, find_model, load_translator
from toolkit.models.loading.weights import saved_weights
from toolkit.models.processor import PoseProcessor
from toolkit.models.translator import PoseTranslator
from toolkit.poses.landmarks import LandmarkSet

KEY = "model.init_from"


@dataclass(frozen=True)
class Source:
    """A trained translator, without its weights.

    Attributes:
        name: as the recipe gives it.
        place: its folder, or its hub id.
        has_adapter: its files do not hold the weights as the model computes with them, so that it is loaded and its
            adapters are merged.
    """

    name: str
    place: str
    config: PoseTranslatorConfig
    processor: PoseProcessor
    generation: GenerationConfig
    has_adapter: bool

    @property
    def landmark_set(self) -> LandmarkSet:
        return LandmarkSet.from_dict(self.processor.feature_extractor.landmark_set)


def read_source(name: str) -> Source:
    """Read what a trained translator is; of the hub its configuration and its processor are downloaded.

    Raises:
        UserError: there is no such model, it is no translator, or it is not whole.
    """
    try:
        place = find_model(name)
        kind = PreTrainedConfig.get_config_dict(place)[0].get("model_type")
        if kind != PoseTranslatorConfig.model_type:
            raise UserError(f"{place} is a {kind}, not a pose translator", "a backbone is named by model.backbone")
        config = PoseTranslatorConfig.from_pretrained(place)
        processor, generation = PoseProcessor.from_pretrained(place), GenerationConfig.from_pretrained(place)
        has_adapter = config.adapter is not None or read_base(Path(place)) is not None
        return Source(name, place, config, processor, generation, has_adapter)
    except UserError as error:
        raise UserError(f"{KEY}={name}: {error.message}", error.hint) from error
    except NOT_LOADED as error:
        raise _not_loadable(name, error) from error


def fetch_source(name: str) -> None:
    """Download a hub id's weights, or those of its base model, into this machine's cache."""
    try:
        fetch_translator(name)
    except UserError as error:
        raise UserError(f"{KEY}={name}: {error.message}", error.hint) from error


def empty_source(source: Source) -> PoseTranslator:
    """The translator's modules without memory for weights."""
    backbone = empty_backbone(source.config.backbone_config())
    with torch.device("meta"):
        return PoseTranslator(source.config, backbone)


def open_weights(source: Source) -> Callable[[str], Tensor]:
    """The translator's weights by name, adapters merged and packed layers unpacked, on the CPU.

    Files of plain weights are read tensor by tensor. A translator with an adapter or a quantised backbone is loaded
    whole first, so that host memory holds a copy of it for as long as the reader lives.

    Raises:
        UserError: the weights are not there, or not those of its configuration.
    """
    try:
        if source.has_adapter:
            return _merged(source)
        return saved_weights(_folder(source), empty_source(source))
    except UserError as error:
        raise UserError(f"{KEY}={source.name}: {error.message}", INTACT_COPY) from error


def open_added(source: Source) -> Callable[[str], Tensor]:
    """Weights of the pose encoder and the CTC head, which a folder holds as they are whatever was adapted.

    Raises:
        UserError: they cannot be read.
    """
    folder = _folder(source)
    try:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        places = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{KEY}={source.name}: its weights cannot be read: {first_line(error)}", INTACT_COPY) from error

    def read(name: str) -> Tensor:
        if name not in places:
            raise UserError(f"{KEY}={source.name}: {folder} holds no {name}", INTACT_COPY)
        return places[name].get_tensor(name)

    return read


def _folder(source: Source) -> Path:
    """The folder of its files, downloaded where the hub has them."""
    try:
        return fetch_weights(source.place) or Path(source.place)
    except NOT_LOADED as error:
        raise _not_loadable(source.name, error) from error


@torch.no_grad()
def _merged(source: Source) -> Callable[[str], Tensor]:
    from toolkit.models.adaptation.merge import make_standalone, merge  # these import PEFT

    # Rebuilding draws random numbers, and the run's own must not depend on it.
    with torch.random.fork_rng(devices=[]):
        model, _ = load_translator(source.place)
        if adapter := make_standalone(model):
            merge(model, adapter)
    tensors = model.state_dict()
    return lambda name: tensors[name].cpu()


def _not_loadable(name: str, error: Exception) -> UserError:
    trouble = hub_trouble(error, name) or HubTrouble(f"cannot be loaded: {first_line(error)}", INTACT_COPY)
    return UserError(f"{KEY}={name}: the model {trouble.what}", trouble.remedy)


def history_of(source: Source) -> dict[str, Any]:
    """What is known of how the translator came to be: its step, its scores, and what it started from in turn.

    ``evaluation.json`` of a run's model says the first two, the card of an exported one the scores. Names of folders
    on this machine are left out.
    """
    name = Path(source.name).name if Path(source.name).is_absolute() else source.name
    history: dict[str, Any] = {"source": name, "step": None, "scores": {}, "lineage": source.config.lineage}
    folder = Path(source.place)
    try:
        content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        history |= {"step": content.get("step"), "scores": content.get("scores") or {}}
    except (OSError, ValueError, AttributeError):
        history["scores"] = _scores_of_card(folder / "README.md")
    return history


def _scores_of_card(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        results = ModelCard.load(path).data.eval_results or []
    except (ValueError, OSError):
        return {}
    return {str(result.metric_type): result.metric_value for result in results}
