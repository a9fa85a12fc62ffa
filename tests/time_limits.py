"""Time limits of tests that start processes: they end what hangs, and fail no test because the machine is busy."""

from __future__ import annotations

import os


def limit(seconds: float) -> float:
    """Seconds to wait for what takes at most ``seconds`` on an idle machine; they grow with the load per core."""
    return seconds * max(1.0, max(os.getloadavg()[:2]) / (os.cpu_count() or 1))
