"""The base model of adapters: how its weights are loaded or made again, and their fingerprint.

A run with adapters or a quantised backbone saves what it trained. Loading it needs the same frozen weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.files import read_text, write_text_atomically

BASE_FILE = "base.json"
BASE_FOLDER = "base"  # of a base's own weights, in the run directory and in each model folder

# Gives the values of the parameter or buffer of that name; the tensor passed along has its shape and dtype.
TensorReader = Callable[[str, Tensor], Tensor]
# Gives a reader of a backbone's tensors, from the reader of those that it would have otherwise.
Override = Callable[[TensorReader], TensorReader]


@dataclass(frozen=True)
class BaseReference:
    """How to load or make a backbone again, and how to check that it is the same."""

    name: str  # the backbone, as messages name it
    model: dict[str, Any]  # the recipe's section: how it is loaded or made, quantised and adapted
    seed: int  # of its random weights, and of the adapters'
    precision: str  # ``fp32``, ``bf16`` or ``fp16``: what its weights were cast to
    fingerprint: str  # of its weights as they came, before they were cast or quantised
    weights: Path | None = None  # folder of its weights where neither the hub nor a seed gives them (model.init_from)

    def save(self, folder: Path) -> None:
        """Write it beside the weights; the base's own, if any, are linked there, or copied to another file system."""
        values = asdict(self) | {"weights": self.weights and BASE_FOLDER}
        if self.weights:
            (folder / BASE_FOLDER).mkdir()
            for path in sorted(self.weights.glob("*.safetensors")):
                _link(path, folder / BASE_FOLDER / path.name)
        write_text_atomically(folder / BASE_FILE, json.dumps(values, indent=2) + "\n")


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


@dataclass
class Fingerprint:
    """Hashes weights as they are read into a model, in any order."""

    _digests: dict[str, str] = field(default_factory=dict)

    def watch(self, source: TensorReader) -> TensorReader:
        """The same reader, which hashes what it reads."""

        def seen(name: str, tensor: Tensor) -> Tensor:
            values = source(name, tensor)
            if isinstance(tensor, nn.Parameter):  # buffers follow from the configuration
                self._digests[name] = _digest(values)
            return values

        return seen

    def hexdigest(self) -> str:
        """The fingerprint of all that was read; empty where nothing was (ranks that receive their weights)."""
        if not self._digests:
            return ""
        listed = "".join(f"{name} {self._digests[name]}\n" for name in sorted(self._digests))
        return xxhash.xxh3_128(listed.encode()).hexdigest()


def _digest(values: Tensor) -> str:
    data = values.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    digest = xxhash.xxh3_128(f"{values.dtype}{tuple(values.shape)}".encode())
    digest.update(data.numpy().data)
    return digest.hexdigest()


def read_base(folder: Path) -> BaseReference | None:
    """The base model of the weights in ``folder``; None where they are whole.

    Raises:
        UserError: it is not readable.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        return None
    try:
        base = BaseReference(**json.loads(read_text(path, "the base of an adapter")))
        return replace(base, weights=folder / base.weights) if base.weights else base
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not readable ({error})", "copy the run's best/ again") from error


def check_same(expected: BaseReference, found: str, folder: Path) -> None:
    """Raise UserError where the backbone that was made is not the one that the adapter was trained on."""
    if found != expected.fingerprint:
        raise UserError(
            f"{folder} was trained on other weights of {expected.name} than those found: its base has the fingerprint "
            f"{expected.fingerprint}, this one {found}",
            "restore the base: for a hub id its revision, for random weights this toolkit's version",
        )
