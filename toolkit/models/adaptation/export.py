"""A trained model becomes a folder to share: whole or not there, and read back before anybody relies on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from toolkit.errors import UserError
from toolkit.models.adaptation.adapter_files import ADAPTER_FOLDER, save_adapter
from toolkit.models.adaptation.merge import Adapter, attach_adapter, make_standalone, merge
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.processor import PoseProcessor
from toolkit.models.translator import PoseTranslator
from toolkit.recipe.deepspeed.compatibility import OVERFLOWS_IN_FP16

CARD = "README.md"


def check_target(folder: Path, *, replace: bool) -> None:
    """Raise UserError where an export must not go: over anything that is not an exported or trained model."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    try:
        is_model = json.loads(config.read_text(encoding="utf-8")).get("model_type") == PoseTranslatorConfig.model_type
    except (OSError, ValueError, AttributeError):
        is_model = False
    if not is_model:
        raise UserError(f"{folder} is there and is no model of this toolkit: choose another --to")
    if not replace:
        raise UserError(f"{folder} holds a model already: choose another --to, or add --replace")


def check_dtype(model: PoseTranslator, dtype: str | None) -> None:
    """Raise UserError where the weights do not survive ``dtype``."""
    architecture = model.config.backbone.get("model_type")
    if dtype == "fp16" and architecture in OVERFLOWS_IN_FP16:
        raise UserError(f"--dtype fp16: a {architecture} overflows to NaN in fp16: choose bf16 or fp32")


def export_model(
    model: PoseTranslator,
    processor: PoseProcessor,
    folder: Path,
    *,
    card: str,
    dtype: str | None,
    replace: bool,
    merge_adapter: bool = False,
) -> float:
    """Write a model folder that transformers loads after ``import toolkit.auto``, whatever trained it.

    Quantised layers are written as the numbers that they stand for. An adapter is merged, or written beside the weights
    as PEFT's own folder, which ``from_pretrained`` puts on.

    Args:
        model: made to stand alone and changed to ``dtype`` in place.
        processor: goes beside it.
        folder: where it will be; until it is complete and read back it has another name.
        card: the text of its README.
        dtype: ``fp32``, ``bf16`` or ``fp16`` of the weights; None leaves them as they are.
        replace: whether a model that is there already gives way.
        merge_adapter: add the adapter to the weights that it adapts.

    Returns:
        the largest difference of a next-token probability between the model and what was written; 0 unless ``dtype``,
        merging, unpacking or new tokens changed it.

    Raises:
        UserError: the folder is taken, or the weights do not survive ``dtype``.
    """
    check_target(folder, replace=replace)
    check_dtype(model, dtype)
    before = _probabilities(model)
    adapter = _make_plain(model, TORCH_DTYPES[dtype] if dtype else None, merge_adapter=merge_adapter)
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        if adapter:
            save_adapter(partial / ADAPTER_FOLDER, adapter.config, adapter.weights)
            attach_adapter(model, adapter)
        processor.save_pretrained(partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        for file in partial.rglob("*.*"):  # weights are written for their owner alone, and this folder is to be shared
            file.chmod((partial / CARD).stat().st_mode)
        after = _probabilities(_read_back(partial, model))
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}", "give another --to, on a disk with free space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return float((before - after).abs().max())


def _make_plain(model: PoseTranslator, dtype: torch.dtype | None, *, merge_adapter: bool) -> Adapter | None:
    """Leave a model of ordinary weights; give back its adapter where that stays apart."""
    adapter = make_standalone(model)
    if adapter and merge_adapter:
        merge(model, adapter)
        adapter = None
    if dtype:
        model.to(dtype)
    model.config.adapter = ADAPTER_FOLDER if adapter else None
    if adapter and dtype:
        adapter = Adapter(adapter.config, {name: tensor.to(dtype) for name, tensor in adapter.weights.items()})
    return adapter


def _read_back(folder: Path, model: PoseTranslator) -> PoseTranslator:
    """The model in ``folder`` as its users load it, seen to be ``model``: names, shapes, values and outputs."""
    loaded = AutoModel.from_pretrained(folder).eval()
    AutoProcessor.from_pretrained(folder)
    written, expected = loaded.state_dict(), model.state_dict()
    different = [name for name in expected.keys() | written.keys() if not _same(written.get(name), expected.get(name))]
    if different:
        raise AssertionError(f"the written model differs from the trained one in {', '.join(sorted(different)[:5])}")
    if not torch.equal(_probabilities(loaded), _probabilities(model)):
        raise AssertionError("the written model answers otherwise than the trained one")
    return loaded


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def _probabilities(model: PoseTranslator) -> Tensor:
    """Next-token probabilities for a made-up clip, float32 [tokens, vocabulary].

    Raises:
        UserError: they are not numbers.
    """
    frames, points, channels = 32, model.config.num_points, model.config.num_channels
    poses = torch.linspace(-2, 2, frames * points * channels).sin().reshape(1, frames, points, channels)
    visible = torch.ones(1, frames, points, dtype=torch.bool)
    labels = torch.arange(2, 10)[None]
    logits = model(poses, visible, torch.ones(1, frames, dtype=torch.bool), labels).logits[0]
    if not logits.isfinite().all():
        raise UserError(f"the model answers with NaN or infinity in {model.dtype}: choose another --dtype")
    return logits.float().softmax(dim=-1)
