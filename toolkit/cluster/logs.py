"""Logs of the libraries and the toolkit go to a file, so that the terminal shows the run."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.cluster.secrets import RedactingFormatter

LIBRARIES = ("DeepSpeed", "transformers", "datasets", "torch", "bitsandbytes", "py.warnings")


# It warns at every product in int8 that its input is cast to fp16: thousands of times a step.
REPEATS = "bitsandbytes"
# DeepSpeed (0.19.8) calls collectives by names that torch 2.13 replaces, which no user can change.
REPLACED = re.compile(r"`torch\.distributed\.\w+` is deprecated")


class _LogFile(logging.FileHandler):
    """A log that cannot be written, on a full disk, prints no traceback to the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _said_once() -> Callable[[logging.LogRecord], bool]:
    """A filter that leaves out what the library that repeats its messages has said before."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != REPEATS:
            return True
        message = record.getMessage()
        is_new = message not in said
        said.add(message)
        return is_new

    return is_new


def _concerns_a_run(record: logging.LogRecord) -> bool:
    return not (record.name == "py.warnings" and REPLACED.search(record.getMessage()))


def import_deepspeed() -> None:
    """Import DeepSpeed, which sets up its logging as it is imported, without what it prints then."""
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        deepspeed.accelerator.get_accelerator()


def log_to_file(log: Path | None) -> None:
    """Send the logs of DeepSpeed, transformers and the toolkit to a file without secrets; None drops them."""
    import_deepspeed()
    handler = _LogFile(log, encoding="utf-8") if log else logging.NullHandler()
    handler.addFilter(_said_once())
    handler.addFilter(_concerns_a_run)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("toolkit", *LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("toolkit").setLevel(logging.INFO)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def show_errors_only() -> None:
    """For commands without a log: of the libraries' logs only errors reach the terminal, and no progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Within it, what a library prints goes to the log: DeepSpeed prints its memory and the time to load an op."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
            logging.getLogger("toolkit").info(line)
