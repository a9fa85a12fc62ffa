"""launch/train.py, which notes at every fork of its process what is there by then. First argument: where to."""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from pathlib import Path

NOTES = Path(sys.argv.pop(1))


def note() -> None:
    from torch import cuda, distributed

    there = {
        "threads": [thread.name for thread in threading.enumerate()],
        "group": distributed.is_initialized(),
        "gpu": cuda.is_initialized(),
    }
    with NOTES.open("a") as notes:
        print(json.dumps(there), file=notes)


os.register_at_fork(before=note)
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
