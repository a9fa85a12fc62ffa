"""Processes for the price of a fork: one process imports everything, and its children run what Python would start.

``tests/end_to_end/warm_launcher.py`` forks DeepSpeed's launchers and their ranks so, ``tests/gpu/forked_ranks.py`` the
ranks with pretended GPUs.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

# What a run imports, on its way from the recipe to the report.
RUN_MODULES = (
    "deepspeed.ops.adam",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # of every first engine, and with it torch's inductor, for seconds
    "peft",
    "transformers.models.auto",
    "transformers.models.t5.modeling_t5",
    "toolkit.reporting.report",
    "toolkit.training.results",
    "toolkit.training.overfit",
    "toolkit.training.run",
)


def import_all(modules: Iterable[str]) -> None:
    """Import the modules of a run and these."""
    for module in (*modules, *RUN_MODULES):
        importlib.import_module(module)


def write_to(out: str | Path, errors: str | Path | None = None) -> None:
    """Append stdout and stderr of this process to a file, or to one each."""
    for stream, path in ((1, out), (2, errors or out)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)


def end_with(work: Callable[[], object]) -> NoReturn:
    """Do the work of this fork and end as Python would: with its exit code, its traceback, or by SIGINT."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
