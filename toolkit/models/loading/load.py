"""A translator with its processor, from a run directory, a model folder or the hub."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig

from toolkit.errors import UserError, first_line
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.loading.base_model import BaseReference, check_same, read_base
from toolkit.models.loading.hub import NOT_LOADED, HubTrouble, fetch_weights, hub_trouble
from toolkit.models.processor import PoseProcessor
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.paths import BEST

INTACT_COPY = "copy the whole folder again, or export the run again"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def fetch_translator(name: str | Path) -> None:
    """Download a translator's weights, or those of its base model, into this machine's cache, where the hub has them.

    Raises:
        UserError: there is no such model, or its base cannot be loaded; :func:`load_translator` reports the rest.
    """
    source = find_model(name)
    if base := read_base(Path(source)):
        if base.weights:
            return  # they are in its folder
        # Imports PEFT and DeepSpeed, which whole models do without; the recipe's schema imports pydantic.
        from toolkit.models.build import fetch_backbone
        from toolkit.recipe.sections.model import Model

        fetch_backbone(Model.model_validate(base.model))
        return
    with contextlib.suppress(*NOT_LOADED):
        fetch_weights(source)


def load_translator(name: str | Path, **settings: Any) -> tuple[PoseTranslator, PoseProcessor]:
    """Load a translator, in evaluation mode, and its processor; settings as of ``from_pretrained``.

    A run directory (its ``best/`` is meant), a model folder, or the id of a model on the hub names it.

    Raises:
        UserError: there is no such model, or it is not whole.
    """
    source = find_model(name)
    base = read_base(Path(source))
    if base:
        model, processor = load_adapted(Path(source), base)
        return model.to(settings["dtype"]) if settings.get("dtype") else model, processor
    try:
        model = PoseTranslator.from_pretrained(source, **settings).eval()
        processor = PoseProcessor.from_pretrained(source)
    except (*NOT_LOADED, SafetensorError) as error:
        raise _not_loadable(source, error) from error
    return model, processor


def load_processor(name: str | Path) -> tuple[PoseProcessor, GenerationConfig]:
    """A translator's processor and how it searches by default, without its weights.

    Raises:
        UserError: there is no such model, or its folder is not complete.
    """
    source = find_model(name)
    try:
        return PoseProcessor.from_pretrained(source), GenerationConfig.from_pretrained(source)
    except NOT_LOADED as error:
        raise _not_loadable(source, error) from error


def _not_loadable(source: str, error: Exception) -> UserError:
    trouble = hub_trouble(error, source) or HubTrouble(f"cannot be loaded: {first_line(error)}", INTACT_COPY)
    return UserError(f"the model {source} {trouble.what}", trouble.remedy)


def load_adapted(
    folder: Path, base: BaseReference, zero3: dict[str, Any] | None = None
) -> tuple[PoseTranslator, PoseProcessor]:
    """A model of which the folder holds only what was trained; ``zero3`` as for ``rebuild_translator``."""
    # These import PEFT and DeepSpeed, which whole models do without.
    from toolkit.models.adaptation.adapter_files import load_trained
    from toolkit.models.build import rebuild_translator
    from toolkit.models.loading.weights import load_weights

    try:
        config = PoseTranslatorConfig.from_pretrained(folder)
        generation = GenerationConfig.from_pretrained(folder)
        processor = PoseProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"the model {folder} cannot be loaded: {first_line(error)}", INTACT_COPY) from error
    model, fingerprint = rebuild_translator(config, base, processor.tokenizer, zero3=zero3)
    if fingerprint:
        check_same(base, fingerprint, folder)
    model.base = base
    if zero3:
        load_weights(folder, model)
    else:
        load_trained(folder, model)
        # Packed weights are where they were packed, on a GPU where there is one; all others were read on the CPU.
        model.to(next(model.backbone.parameters()).device)
    model.generation_config = generation
    return model.eval(), processor


def find_model(name: str | Path) -> str:
    """The folder of a model, checked, or its hub id.

    Raises:
        UserError: there is no such folder, or it holds no translator or no processor.
    """
    path = Path(name)
    if not path.is_dir():
        # A mistyped runs/demo looks like a hub id, too, and asking the hub for it takes long.
        if not path.exists() and not path.parent.is_dir() and _HUB_ID.fullmatch(str(name)):
            return str(name)
        raise UserError(f"there is no model folder {name}", "give a run directory, a model folder or a hub id")
    folder = next((place for place in (path, path / BEST) if (place / "config.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"{path} holds no model, neither config.json nor {BEST}/",
            "give a run that has been evaluated at least once, or a model folder",
        )
    _check_folder(folder)
    return str(folder)


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} is no model's configuration: {first_line(error)}", INTACT_COPY) from error
    if kind != PoseTranslatorConfig.model_type:
        raise UserError(
            f"{folder} holds a model of type {kind}, not a pose translator", "give a run directory or an exported model"
        )
    if not (folder / "processor_config.json").is_file():
        raise UserError(
            f"{folder} holds a model without its processor (processor_config.json), which knows the landmarks",
            INTACT_COPY,
        )
