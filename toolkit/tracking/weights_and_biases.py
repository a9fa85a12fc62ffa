"""Weights & Biases: online, or offline into the run directory; a resumed run continues under its own W&B id."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.tracking.background import warn

RUN_ID_FILE = "wandb_run_id.txt"


class WeightsAndBiases:
    """Sends a run's figures to Weights & Biases.

    Only what ``log`` and ``table`` get is sent: no console output, source code, git remote, command line, machine
    description or error report.
    """

    def __init__(self, run_dir: Path, mode: str, project: str, config: dict[str, Any], timeout: float) -> None:
        """Start or resume the W&B run of this run directory.

        A run that cannot be ``online``, for whatever reason, is ``offline``; its id and its files are in the run
        directory. The W&B server may take ``timeout`` seconds.
        """
        # W&B reads it as it is imported; it reports errors of its own to its server otherwise.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        self._run = self._start(run_dir, mode, project, config, timeout)
        # Our own step is the axis: W&B would drop every point that a resumed run logs below W&B's own counter.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _start(self, run_dir: Path, mode: str, project: str, config: dict[str, Any], timeout: float) -> Any:
        wandb = self._wandb
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            init_timeout=timeout,
        )
        # Logging in knows only these settings, not those of the run.
        wandb.setup(wandb.Settings(silent=True, mode=mode))
        arguments = {"project": project, "name": run_dir.name, "id": _run_id(run_dir), "config": config}
        if mode == "online":
            try:
                # W&B knows where it keeps keys, and for which host; it asks for none here.
                if wandb.login(prompt=False, verify=False):
                    return wandb.init(**arguments, resume="allow", mode="online", dir=str(run_dir), settings=settings)
                _warn_offline(run_dir, "no API key here")
            except Exception as error:
                _warn_offline(run_dir, f"W&B cannot be reached ({type(error).__name__})")
                wandb.teardown()  # its process holds the run's id, as that of a run that is being started
        return wandb.init(**arguments, resume="allow", mode="offline", dir=str(run_dir), settings=settings)

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None:
        """Send named figures of one step, grouped by kind."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Send a table, such as sample outputs."""
        if rows:
            head = list(rows[0])
            table = self._wandb.Table(columns=head, data=[[row.get(key) for key in head] for row in rows])
            self._run.log({"step": step, name: table})

    def close(self) -> None:
        """Finish the W&B run; what has not been sent yet is sent first."""
        self._run.finish()


def _warn_offline(run_dir: Path, why: str) -> None:
    warn(
        f"wandb: {why}, so figures are kept offline; send them later by `wandb login` "
        f"and `wandb sync {run_dir}/wandb/offline-run-*`"
    )


def _run_id(run_dir: Path) -> str:
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
