"""Fills a model with what a plan takes, and keeps the frozen weights that come out of it.

A run that saves only what it trained (LoRA, a quantised backbone) needs its frozen weights again. Those that a trained
translator gave are in no hub: the run writes them once, beside its models, and each saved model holds a link to them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from toolkit.errors import UserError, first_line
from toolkit.files import give_usual_modes
from toolkit.models.loading.base_model import Override, TensorReader
from toolkit.models.translator import PoseTranslator
from toolkit.models.warm_start.plan import Plan
from toolkit.models.warm_start.source import open_added, open_weights

SHARD_BYTES = 2**30  # of a file of frozen weights, about


@dataclass(frozen=True)
class WarmStart:
    """How a run's model gets weights that are neither random nor published.

    Attributes:
        plan: what is taken; None where the run resumes, so that a checkpoint holds what trains.
        base: folder of the frozen weights of a run that saves only what it trained; None for others.
        keeps_base: whether this process writes that folder.
        generation: tokens that the source must not write, and the like, of its settings of the search.
        lineage: what the saved model's configuration says of the source.
    """

    plan: Plan | None
    base: Path | None = None
    keeps_base: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] | None = None

    @contextmanager
    def override(self) -> Iterator[Override]:
        """Within it the backbone is read from the source, or where the run resumes from its folder of frozen weights.

        A process that keeps the folder has written it when this ends.
        """
        if self.plan is None:
            yield frozen_weights(self.base) if self.base else lambda fallback: fallback
        elif self.base and self.keeps_base:
            taken, recorder = _taken(self.plan), _Recorder(self.base)
            yield lambda fallback: recorder.watch(taken(fallback))
            recorder.finish()
        else:
            yield _taken(self.plan)

    @torch.no_grad()
    def fill_added(self, model: PoseTranslator) -> None:
        """Give the pose encoder and the CTC head what is taken, while they are whole."""
        if self.plan is None:
            return
        names = [name for name in self.plan.mappings if not name.startswith("backbone.")]
        if not names:
            return
        read, tensors = open_added(self.plan.source), model.state_dict(keep_vars=True)
        for name in names:
            mapping = self.plan.mappings[name]
            tensors[name].copy_(mapping.apply(read(mapping.source), tensors[name].detach()))

    def known_tokens(self, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[bool]:
        """Which of these tokens have a row of the source's in the model's tables."""
        if self.plan is None or self.plan.tokens is None or not self._takes_tables:
            return [False] * len(tokens)
        return [bool(self.plan.tokens.places[place] >= 0) for place in tokenizer.convert_tokens_to_ids(tokens)]

    @property
    def _takes_tables(self) -> bool:
        assert self.plan is not None
        return any(
            mapping.new == "mean" and name.startswith("backbone.") for name, mapping in self.plan.mappings.items()
        )


def _taken(plan: Plan) -> Override:
    def wrapped(fallback: TensorReader) -> TensorReader:
        opened: list[Callable[[str], Tensor]] = []  # files are opened by processes that read, when they do

        def read(name: str, like: Tensor) -> Tensor:
            mapping = plan.mappings.get(f"backbone.{name}")
            if mapping is None:
                return fallback(name, like)
            if not opened:
                opened.append(open_weights(plan.source))
            values = opened[0](mapping.source)
            return mapping.apply(values, values)  # every new place of a backbone is a mean

        return read

    return wrapped


def frozen_weights(folder: Path) -> Override:
    """The reader of a backbone whose frozen weights are in a folder; of buffers that it lacks, the other reader."""

    def wrapped(fallback: TensorReader) -> TensorReader:
        try:
            files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
            places = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the frozen weights in {folder} cannot be read: {first_line(error)}", "copy the run's folder again"
            ) from error

        def read(name: str, like: Tensor) -> Tensor:
            if name in places:
                return places[name].get_tensor(name)
            if isinstance(like, nn.Parameter):
                raise UserError(f"the frozen weights in {folder} lack {name}", "copy the run's folder again")
            return fallback(name, like)

        return read

    return wrapped


class _Recorder:
    """Writes what is read into a folder, which has another name until it is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.tensors: dict[str, Tensor] = {}
        self.files = 0

    def watch(self, source: TensorReader) -> TensorReader:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

        def read(name: str, like: Tensor) -> Tensor:
            values = source(name, like)
            self.tensors[name] = values.detach().to("cpu").contiguous()
            if sum(tensor.nbytes for tensor in self.tensors.values()) >= SHARD_BYTES:
                self._write()
            return values

        return read

    def finish(self) -> None:
        self._write()
        give_usual_modes(self.partial)
        shutil.rmtree(self.folder, ignore_errors=True)  # of a start that ended before its first step
        self.partial.rename(self.folder)

    def _write(self) -> None:
        if self.tensors:
            self.files += 1
            save_file(self.tensors, self.partial / f"weights_{self.files:03d}.safetensors", metadata={"format": "pt"})
            self.tensors = {}
