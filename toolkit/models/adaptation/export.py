"""Exports a trained model to a folder to share, which is compared with it before and after it is written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from toolkit.errors import UserError
from toolkit.files import give_usual_modes
from toolkit.models.adaptation.adapter_files import ADAPTER_FOLDER, save_adapter
from toolkit.models.adaptation.merge import Adapter, attach_adapter, detach_adapter, make_standalone, merge
from toolkit.models.backbone import vocabulary_size
from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.processor import PoseProcessor
from toolkit.models.translator import PoseTranslator
from toolkit.models.vocabulary.restore import WholeVocabulary
from toolkit.recipe.deepspeed.compatibility import OVERFLOWS_IN_FP16

CARD = "README.md"
# How far an export's scores may be from the run's, in standard deviations (see `_check_agreement`), by the dtype that
# it computes in: small models were within 1e-5, 0.023 and 0.16, and rounding errors grow with depth.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}


def check_target(folder: Path, *, replace: bool) -> None:
    """Raise UserError where an export would overwrite anything that is not an exported or trained model."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    try:
        is_model = json.loads(config.read_text(encoding="utf-8")).get("model_type") == PoseTranslatorConfig.model_type
    except (OSError, ValueError, AttributeError):
        is_model = False
    if not is_model:
        raise UserError(f"{folder} is there and is no model of this toolkit", "choose another --to")
    if not replace:
        raise UserError(f"{folder} holds a model already", "choose another --to, or add --replace")


def check_dtype(model: PoseTranslator, dtype: str | None) -> None:
    """Raise UserError where the weights do not survive ``dtype``."""
    architecture = model.config.backbone.get("model_type")
    if dtype == "fp16" and architecture in OVERFLOWS_IN_FP16:
        raise UserError(f"--dtype fp16: a {architecture} overflows to NaN in fp16", "choose --dtype bf16 or fp32")


def export_model(
    model: PoseTranslator,
    processor: PoseProcessor,
    folder: Path,
    *,
    card: str,
    dtype: str | None,
    replace: bool,
    merge_adapter: bool = False,
    whole: WholeVocabulary | None = None,
) -> float:
    """Write a model folder that transformers loads after ``import toolkit.auto``, whatever trained it.

    Quantised layers are written as the numbers that they stand for. An adapter is merged, or written beside the weights
    in PEFT's own form, which ``from_pretrained`` loads. A trimmed vocabulary becomes ``whole`` where that is given.
    Nothing is written unless the result agrees with the model.

    The model becomes one of plain weights in ``dtype`` (None: as they are), in place. The folder has another name until
    it is complete and read back; ``card`` is the text of its README.

    Returns:
        the largest difference of a next-token probability between the model and what was written; 0 unless ``dtype``,
        merging, unpacking or new tokens changed it.

    Raises:
        UserError: the folder is taken, cannot be written, or would hold a model that gives other results.
    """
    check_target(folder, replace=replace)
    check_dtype(model, dtype)
    tolerance, before = _tolerance(model), _scores(model)
    adapter = make_standalone(model)
    if adapter and merge_adapter:
        merge(model, adapter)
        adapter = None
    kept = None
    if whole:
        whole.give_to(model)
        processor, kept = whole.processor, whole.kept
    model.config.adapter = ADAPTER_FOLDER if adapter else None
    after = _scores_with(model, adapter, kept)
    _check_agreement(before, after, tolerance)
    if dtype:
        model.to(TORCH_DTYPES[dtype])
        adapter = adapter and adapter.to(TORCH_DTYPES[dtype])
        after = _scores_with(model, adapter, kept)
        _check_agreement(before, after, max(tolerance, TOLERANCES[dtype]))
    _write(model, processor, adapter, folder, card)
    return float((before.softmax(dim=-1) - after.softmax(dim=-1)).abs().max())


def _write(model: PoseTranslator, processor: PoseProcessor, adapter: Adapter | None, folder: Path, card: str) -> None:
    """Write the folder under a temporary name, read it back, and let it take its name."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        if adapter:
            save_adapter(partial / ADAPTER_FOLDER, adapter.config, adapter.weights)
            attach_adapter(model, adapter)
        processor.save_pretrained(partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        give_usual_modes(partial)
        _read_back(partial, model)
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


def _read_back(folder: Path, model: PoseTranslator) -> None:
    """Load ``folder`` as its users do, and check that it is ``model``: names, shapes, values and results."""
    loaded = AutoModel.from_pretrained(folder).eval()
    AutoProcessor.from_pretrained(folder)
    written, expected = loaded.state_dict(), model.state_dict()
    different = [name for name in expected.keys() | written.keys() if not _same(written.get(name), expected.get(name))]
    if different:
        raise AssertionError(f"the written model differs from the trained one in {', '.join(sorted(different)[:5])}")
    if not torch.equal(_scores(loaded), _scores(model)):
        raise AssertionError("the written model gives other scores than the trained one")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _tolerance(model: PoseTranslator) -> float:
    """The tolerance of :func:`_check_agreement` for plain weights in the dtype of the run's model."""
    quantization = (model.base.model["quantization"] if model.base else None) or {}
    # int8 layers multiply in fp16, NF4 ones in their compute type.
    packed = "fp16" if quantization.get("kind") == "int8" else quantization.get("compute_dtype", "fp32")
    own = next(name for name, dtype in TORCH_DTYPES.items() if dtype == model.dtype)
    return max(TOLERANCES[packed], TOLERANCES[own])


def _check_agreement(before: Tensor, after: Tensor, tolerance: float) -> None:
    """Raise UserError where an export's scores differ from the run's by more than rounding explains.

    The measure is the largest error of a token's score, in standard deviations of all tokens' scores at its place: it
    does not depend on how sure the model is, and one wrong row of a token table is seen among a hundred thousand.
    """
    error = float(((after - before).abs().amax(dim=-1) / before.std(dim=-1)).max())
    if not error <= tolerance:
        raise UserError(
            f"the export gives other scores than the run's model: they differ by {error:.2g} standard deviations, and "
            f"rounding explains {tolerance:g}",
            "export without --merge-lora, or with --dtype fp32; nothing was written",
        )


def _scores_with(model: PoseTranslator, adapter: Adapter | None, tokens: Tensor | None) -> Tensor:
    """:func:`_scores` of a model of plain weights with an adapter, which is detached again."""
    if adapter is None:
        return _scores(model, tokens)
    attach_adapter(model, adapter)
    scores = _scores(model, tokens)
    detach_adapter(model)
    return scores


@torch.no_grad()
def _scores(model: PoseTranslator, tokens: Tensor | None = None) -> Tensor:
    """Log-probabilities of the next tokens of three made-up clips, float32 [clips × tokens, vocabulary].

    Of these tokens of a vocabulary, int64 [tokens], as if there were no others; None = of all.

    Raises:
        UserError: they are not numbers.
    """
    clips, frames, length = 3, 32, 8
    shapes = model.config.input_shapes(clips, frames)
    inputs = {
        name: torch.ones(shape, dtype=dtype)
        if dtype == torch.bool
        else torch.linspace(-6, 6, math.prod(shape)).sin().reshape(shape).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    inputs["visible"][1, :, ::2] = False  # every other landmark is missing
    inputs["frame_mask"][2, frames // 2 :] = False  # half of it is padding
    inputs["visible"] &= inputs["frame_mask"][..., None]
    rows = vocabulary_size(model.backbone.config) if tokens is None else len(tokens)
    words = torch.linspace(2, rows - 1, clips * length).long()
    labels = (words if tokens is None else tokens[words]).reshape(clips, length)
    inputs["labels"] = labels
    if model.config.prefix_template:
        inputs["prefix_ids"] = labels[:, :2]
    device = next(model.parameters()).device
    logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.cpu()
    logits = logits if tokens is None else logits[..., tokens]
    if not logits.isfinite().all():
        raise UserError(f"the model gives NaN or infinity in {model.dtype}", "choose another --dtype")
    return logits.float().flatten(0, 1).log_softmax(dim=-1)
