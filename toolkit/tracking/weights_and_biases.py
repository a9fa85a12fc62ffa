"""Weights & Biases: online, or offline into the run directory; a continued run goes on under its own id."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_ID_FILE = "wandb_run_id.txt"


class WeightsAndBiases:
    """Sends a run's figures to Weights & Biases.

    Only what is handed over is sent: no console output, source code, git remote, command line or machine description.
    """

    def __init__(self, run_dir: Path, mode: str, project: str, config: dict[str, Any]) -> None:
        """Start, or go on with, the W&B run of this run directory.

        Args:
            run_dir: holds the run's id and its offline files.
            mode: ``online`` or ``offline``; online without a key falls to offline and says so in one line.
            project: name of the W&B project.
            config: the resolved recipe, shown beside the run.
        """
        import wandb

        if mode == "online" and not has_key():
            _keep_offline(run_dir, "no API key here")
            mode = "offline"
        self._wandb = wandb
        self._run = self._start(run_dir, mode, project, config)
        # Our own step is the axis: W&B would drop every point that a continued run repeats below its own counter.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _start(self, run_dir: Path, mode: str, project: str, config: dict[str, Any]) -> Any:
        wandb = self._wandb
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
        )
        arguments = {"project": project, "name": run_dir.name, "id": _run_id(run_dir), "config": config}
        try:
            return wandb.init(**arguments, resume="allow", mode=mode, dir=str(run_dir), settings=settings)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            # Training must not fail for a tracker. The error's text is not shown: it may quote a key or an address with
            # one.
            if mode == "offline":
                raise
            _keep_offline(run_dir, f"W&B cannot be reached ({type(error).__name__})")
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
        """Finish the W&B run; what is still on its way is sent first."""
        self._run.finish()


def has_key() -> bool:
    """Whether W&B could log in: a key in the environment or in the user's netrc; the key itself is not looked at."""
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _keep_offline(run_dir: Path, why: str) -> None:
    print(
        f"wandb: {why}, so figures are kept offline; send them later by `wandb login` "
        f"and `wandb sync {run_dir}/wandb/offline-run-*`",
        file=sys.stderr,
        flush=True,
    )


def _run_id(run_dir: Path) -> str:
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
