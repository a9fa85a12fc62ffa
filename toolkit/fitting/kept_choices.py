"""Choices that were made before: in the run's directory, and on this machine for the same recipe and corpus.

A measurement differs from one time to the next. A run that resumes, and the same command in another folder, take the
choice that was made first, so that they train alike bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from toolkit.checkpointing.run_directory import corpus_identity
from toolkit.corpus.packed import Corpus
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.choices import folder_of
from toolkit.recipe.resolve import MICRO_BATCH_FILE, ResolvedRun, read_choice

# Settings of training that neither change what a micro-batch takes nor which there are.
WITHOUT_EFFECT = (
    "epochs",
    "max_steps",
    "learning_rate",
    "pose_encoder_learning_rate",
    "weight_decay",
    "schedule",
    "warmup_ratio",
    "early_stopping",
    "save_every",
    "keep_last",
    "keep_best",
    "eval_every",
    "log_every",
    "rank_timeout",
    "data_timeout",
    "time_limit",
)


def settings_hash(resolved: ResolvedRun, corpus: Corpus) -> str:
    """A hash of all but the hardware that a choice depends on."""
    recipe = resolved.recipe
    training = recipe.training.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
    content: dict[str, Any] = {
        "model": recipe.model.model_dump(mode="json"),
        "training": training,
        "search": [recipe.evaluation.num_beams, recipe.evaluation.max_new_tokens],
        "augmentation": recipe.augmentation.model_dump(mode="json"),
        "deepspeed": _without_places(resolved.deepspeed),
        "corpus": corpus_identity(corpus),
        "clips": len(corpus.splits["train"]),
    }
    parts, data = corpus.splits["train"].parts, recipe.data
    if len(parts) > 1 or data.epoch_clips:
        content["mixture"] = [[part.weights for part in parts], data.temperature, data.epoch_clips]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _without_places(config: Any) -> Any:
    """A DeepSpeed JSON without the folders of its run, and without the optimizer's numbers."""
    if not isinstance(config, dict):
        return config
    return {key: _without_places(value) for key, value in config.items() if key not in ("nvme_path", "params")}


def earlier_choice(run_dir: Path | None, hardware: str, settings: str) -> tuple[MicroBatchChoice | None, str | None]:
    """A choice for this hardware and these settings, made for the run in ``run_dir`` or on this machine.

    Returns:
        the choice, and a note where the run had another one.
    """
    own = read_choice(run_dir) if run_dir else None
    if own and (own.hardware, own.settings) == (hardware, settings):
        return own, None
    note = None
    if own:
        what = "hardware" if own.hardware != hardware else "settings"
        note = (
            f"{run_dir}/{MICRO_BATCH_FILE} was chosen for other {what} ({own.hardware}): micro-batches are chosen again"
        )
    kept = read_choice(folder_of(hardware, settings))
    return (kept if kept and (kept.hardware, kept.settings) == (hardware, settings) else None), note
