"""The model folder of a run with adapters or a quantised backbone: what trained, and which base model it needs.

    config.json, ...       the configuration and the processor, as in any model folder
    base.json              how the base model is loaded or made, and its fingerprint
    adapter/               the adapters, in PEFT's own form; only where there are some
    trained.safetensors    everything else that trained: the pose encoder, norms, embeddings, rows of new tokens

Reading is strict: every tensor that trains must be there with its shape, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.errors import UserError, first_line
from toolkit.models.adaptation.adapters import ADAPTER
from toolkit.models.translator import PoseTranslator

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_WEIGHTS = "trained.safetensors"
COPY_AGAIN = "copy the folder again, or train from scratch"


def save_trained(folder: Path, model: PoseTranslator, weights: Mapping[str, Tensor]) -> None:
    """Write the whole weights that trained, and check that every trainable tensor is in the files.

    Raises:
        OSError: it cannot be written.
    """
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is not None:
        save_adapter(folder / ADAPTER_FOLDER, config, weights)
    others = {name: tensor.contiguous() for name, tensor in weights.items() if not is_adapter(name)}
    save_file(others, folder / TRAINED_WEIGHTS, metadata={"format": "pt"})
    problems = _differences(_places(folder), model)
    assert not problems, f"what was written is not what was trained: {problems}"


def save_adapter(folder: Path, config: PeftConfig, weights: Mapping[str, Tensor]) -> None:
    """Write the adapters among ``weights`` as PEFT reads them."""
    folder.mkdir()
    config.save_pretrained(str(folder))
    tensors = {adapter_key(name): tensor.contiguous() for name, tensor in weights.items() if is_adapter(name)}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_trained(folder: Path, model: PoseTranslator) -> None:
    """Load what trained into a model that was adapted as the one that was saved; raises as trained_weights."""
    read = trained_weights(folder, model)
    for name, parameter in trainable_parameters(model).items():
        parameter.copy_(read(name))


def trained_weights(folder: Path, model: PoseTranslator) -> Callable[[str], Tensor]:
    """What trained, to be read tensor by tensor, by the model's names.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; they are named.
    """
    try:
        places = _places(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the trained weights in {folder} cannot be read: {first_line(error)}", COPY_AGAIN) from error
    if problems := _differences(places, model):
        raise UserError(f"{folder} does not hold what this model trains ({problems})", COPY_AGAIN)

    def read(name: str) -> Tensor:
        file, key = places[name]
        return file.get_tensor(key)

    return read


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return ".lora_" in name


def adapter_key(name: str) -> str:
    """What PEFT calls an adapter's parameter in its files."""
    name = f"base_model.model.{name}"
    if "lora_magnitude_vector" in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.", ".")


def _name(key: str) -> str:
    """The inverse of :func:`adapter_key`; what is no adapter's keeps its name."""
    if not key.startswith("base_model.model."):
        return key
    name = key.removeprefix("base_model.model.")
    if name.endswith("lora_magnitude_vector"):
        return f"{name}.{ADAPTER}.weight"
    return name.removesuffix(".weight") + f".{ADAPTER}.weight"


def _places(folder: Path) -> dict[str, tuple[Any, str]]:
    """File and key of each tensor in the folder, by the model's name of it."""
    paths = (folder / TRAINED_WEIGHTS, folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS)
    files = [safe_open(path, "pt") for path in paths if path.is_file()]
    return {_name(key): (file, key) for file in files for key in file.keys()}  # noqa: SIM118 - it is no dict


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _differences(places: Mapping[str, tuple[Any, str]], model: PoseTranslator) -> str:
    found = {name: tuple(file.get_slice(key).get_shape()) for name, (file, key) in places.items()}
    # Whole shapes, where ZeRO-3 has partitioned them.
    parameters = trainable_parameters(model).items()
    wanted = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters}
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]},
    }
    return "; ".join(f"{what}: {', '.join(sorted(names)[:5])}" for what, names in problems.items() if names)
