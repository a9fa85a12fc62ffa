"""launch/train.py of the clone in which it runs, where a stand-in for CUDA graphs repeats recorded calls.

Each replay is a line in the run's log.txt.
"""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

ROOT, CLONE = Path(__file__).resolve().parents[2], Path.cwd()


def main() -> None:
    sys.path[0] = str(CLONE)  # whose toolkit it is
    sys.path.append(str(ROOT))
    from toolkit.cluster.ops import use_extensions_dir

    use_extensions_dir()
    from tests.recorded_calls import RecordedCalls
    from toolkit.training import pass_graphs

    recorded = RecordedCalls()

    def capture(call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        result, replay = recorded(call)

        def logged() -> None:
            replay()
            logging.getLogger("toolkit").info("stand-in: replay %d", recorded.replays)

        return result, logged

    pass_graphs.capture_on = lambda device: capture
    sys.argv[0] = str(CLONE / "launch" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
