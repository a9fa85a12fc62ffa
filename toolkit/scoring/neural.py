"""Learnt metrics: COMET and BLEURT.

They are not part of ``Scores``, because their values depend on a checkpoint that must be quoted with them. Their
packages need older transformers than the toolkit, so another Python computes them (see ``neural_worker.py``).
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
# Name -> the package to install, and its module.
PACKAGES = {"comet": ("unbabel-comet", "comet"), "bleurt": ("bleurt-pytorch", "bleurt_pytorch")}


@dataclass(frozen=True)
class NeuralMetrics:
    """Which learnt metrics to compute."""

    checkpoints: dict[str, str] = field(default_factory=dict)  # by metric
    python: str = sys.executable  # an interpreter in whose environment their packages are


def parse_neural(words: Sequence[str], python: str | None = None) -> NeuralMetrics:
    """``comet=CHECKPOINT`` or ``bleurt=CHECKPOINT``, for metrics that ``python`` (None: this one) can compute.

    Raises:
        UserError: there is no such metric or interpreter, or the interpreter cannot import the metric's package.
    """
    metrics = NeuralMetrics(dict(word.partition("=")[::2] for word in words), python or sys.executable)
    for name, checkpoint in metrics.checkpoints.items():
        if name not in PACKAGES or not checkpoint:
            raise UserError(
                f"--neural {name}: not a metric with its checkpoint",
                f"write NAME=CHECKPOINT, with a name of {', '.join(PACKAGES)}",
            )
        if shutil.which(metrics.python) is None:
            raise UserError(
                f"--neural-python {metrics.python} is not a program", "give the path of an environment's bin/python"
            )
        package, module = PACKAGES[name]
        done = subprocess.run([metrics.python, "-c", f"import {module}"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"--neural {name}: {metrics.python} cannot import {package} ({_last_line(done)})",
                f"make an environment by `python -m venv neural-env` and `neural-env/bin/pip install {package} "
                "'transformers<5' 'setuptools<81'`, then add --neural-python neural-env/bin/python",
            )
    return metrics


def neural_score(metrics: NeuralMetrics, name: str, hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The mean of a learnt metric over all pairs.

    A checkpoint is for COMET a name such as ``Unbabel/wmt22-comet-da`` or the path of a ``.ckpt``, for BLEURT a hub id
    such as ``lucadiliello/BLEURT-20`` or a folder.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    checkpoint = metrics.checkpoints[name]
    task = {"name": name, "checkpoint": checkpoint, "hypotheses": list(hypotheses), "references": list(references)}
    command = [metrics.python, str(WORKER)]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    answer = {"error": _last_line(done)} if done.returncode or not answers else json.loads(answers[-1])
    if "error" in answer:
        raise UserError(
            f"the {name} checkpoint {checkpoint} cannot be used: {answer['error']}",
            f"give another one: --neural {name}=CHECKPOINT",
        )
    return float(answer["score"])


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
