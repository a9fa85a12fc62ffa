"""A run that nobody stops, beside one that was stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.as_users_do.conftest import User
from tests.as_users_do.life import Life


def run_without_a_stop(user: User, life: Life, ranks: int, script: str = "launch/train.py") -> Path:
    """Train once more, with the micro-batches that the run chose; gives the run directory."""
    choice = json.loads((life.folder / "micro_batch.json").read_text())
    whole = life.folder.with_name(f"{life.name}_whole")
    chosen = [f"training.micro_batch_size={choice['clips']}", f"evaluation.batch_frames={choice['batch_frames']}"]
    if choice["frames"]:
        chosen.append(f"training.micro_batch_frames={choice['frames']}")
    arguments = [word for word in life.arguments if not word.startswith("run.dir=")]
    done = user.run(script, *arguments, *chosen, f"run.dir={whole}", ranks=ranks)
    assert done.code == 0, done.out + done.err
    return whole
