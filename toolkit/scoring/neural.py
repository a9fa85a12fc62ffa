"""Learnt metrics, where their packages are installed: COMET and BLEURT.

Both want a model of hundreds of megabytes and judge by meaning, in the languages that they were trained on. They are no
part of ``Scores``: their values depend on a checkpoint, which must be quoted with them. Their packages want older
transformers than the toolkit, so they are computed by another Python (see ``neural_worker.py``).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.errors import UserError

WORKER = Path(__file__).with_name("neural_worker.py")
# Name -> what to install, and the module that brings it.
PACKAGES = {"comet": ("unbabel-comet", "comet"), "bleurt": ("bleurt-pytorch", "bleurt_pytorch")}


@dataclass(frozen=True)
class NeuralMetrics:
    """Which learnt metrics to compute.

    Attributes:
        checkpoints: by metric.
        python: the interpreter whose environment has their packages.
    """

    checkpoints: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable


def parse_neural(words: Sequence[str], python: str | None = None) -> NeuralMetrics:
    """``NAME=CHECKPOINT`` for metrics that can be computed here.

    Args:
        words: ``comet=CHECKPOINT`` or ``bleurt=CHECKPOINT``.
        python: the interpreter that has the packages; None = this one.

    Raises:
        UserError: there is no such metric or interpreter, or the interpreter cannot import the metric's package.
    """
    metrics = NeuralMetrics(dict(word.partition("=")[::2] for word in words), python or sys.executable)
    for name, checkpoint in metrics.checkpoints.items():
        if name not in PACKAGES or not checkpoint:
            raise UserError(f"--neural wants NAME=CHECKPOINT with a name of {', '.join(PACKAGES)}, not {name!r}")
        if shutil.which(metrics.python) is None:
            raise UserError(f"--neural-python {metrics.python} is no program: name the python of an environment")
        package, module = PACKAGES[name]
        done = subprocess.run([metrics.python, "-c", f"import {module}"], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            raise UserError(
                f"--neural {name}: {metrics.python} cannot import {package} ({reason}): make an environment for it "
                f"by `python -m venv neural-env` and `neural-env/bin/pip install {package} 'transformers<5' "
                "'setuptools<81'`, then add --neural-python neural-env/bin/python"
            )
    return metrics


def neural_score(metrics: NeuralMetrics, name: str, hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The mean of a learnt metric over all pairs.

    Args:
        metrics: its checkpoint: for COMET a name such as ``Unbabel/wmt22-comet-da`` or the path of a ``.ckpt``, for
            BLEURT a hub id such as ``lucadiliello/BLEURT-20`` or a folder.
        name: ``comet`` or ``bleurt``.
        hypotheses, references: texts in the same order.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    checkpoint = metrics.checkpoints[name]
    task = {"name": name, "checkpoint": checkpoint, "hypotheses": list(hypotheses), "references": list(references)}
    # By its text, not by its path: Python would put that folder first among those from which packages import, and our
    # statistics.py before its own.
    command = [metrics.python, "-c", WORKER.read_text(encoding="utf-8")]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        answer = {"error": reason}
    else:
        answer = json.loads(answers[-1])
    if "error" in answer:
        raise UserError(f"the {name} checkpoint {checkpoint} cannot be used: {answer['error']}")
    return float(answer["score"])
