"""Learnt metrics, where their packages are installed: COMET and BLEURT.

Both want a model of hundreds of megabytes and judge by meaning, in the languages that they were trained on. They are no
part of ``Scores``: their values depend on a checkpoint, which must be quoted with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch

from toolkit.errors import UserError

BATCH = 32


def parse_neural(words: Sequence[str]) -> dict[str, str]:
    """``NAME=CHECKPOINT`` as name -> checkpoint, for metrics that can be computed here.

    Raises:
        UserError: there is no such metric, or its package is not installed.
    """
    wanted = dict(word.partition("=")[::2] for word in words)
    for name, checkpoint in wanted.items():
        if name not in METRICS or not checkpoint:
            raise UserError(f"--neural wants NAME=CHECKPOINT with a name of {', '.join(METRICS)}, not {name!r}")
        package, module, _ = METRICS[name]
        if find_spec(module) is None:
            raise UserError(f"--neural {name} needs a package that is not installed: pip install {package}")
    return wanted


def neural_score(name: str, checkpoint: str, hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The mean of a learnt metric over all pairs.

    Args:
        name: ``comet`` or ``bleurt``.
        checkpoint: for COMET a name such as ``Unbabel/wmt22-comet-da`` or the path of a checkpoint, for BLEURT a hub id
            such as ``lucadiliello/BLEURT-20`` or a folder.
        hypotheses, references: texts in the same order.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    *_, function = METRICS[name]
    try:
        return function(checkpoint, list(hypotheses), list(references))
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the {name} checkpoint {checkpoint} cannot be loaded: {reason}") from error


def _comet(checkpoint: str, hypotheses: list[str], references: list[str]) -> float:
    comet = import_module("comet")
    path = checkpoint if checkpoint.endswith(".ckpt") else comet.download_model(checkpoint)
    model = comet.load_from_checkpoint(path)
    # Signing is no text: the source stays empty, and the reference alone decides.
    rows = [{"src": "", "mt": given, "ref": wanted} for given, wanted in zip(hypotheses, references, strict=True)]
    return float(model.predict(rows, batch_size=BATCH, progress_bar=False).system_score)


def _bleurt(checkpoint: str, hypotheses: list[str], references: list[str]) -> float:
    bleurt = import_module("bleurt_pytorch")
    tokenizer = bleurt.BleurtTokenizer.from_pretrained(checkpoint)
    model = bleurt.BleurtForSequenceClassification.from_pretrained(checkpoint).eval()
    total = 0.0
    for start in range(0, len(references), BATCH):
        pairs = references[start : start + BATCH], hypotheses[start : start + BATCH]
        with torch.no_grad():
            batch = tokenizer(*pairs, padding=True, truncation=True, max_length=512, return_tensors="pt")
            total += float(model(**batch).logits.sum())
    return total / len(references)


# Name -> what to install, the module that brings it, and what computes it.
METRICS: dict[str, tuple[str, str, Callable[[str, list[str], list[str]], float]]] = {
    "comet": ("unbabel-comet", "comet", _comet),
    "bleurt": ("bleurt-pytorch", "bleurt_pytorch", _bleurt),
}
