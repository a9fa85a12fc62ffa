"""Secrets are redacted from logs: the values of environment variables that hold keys."""

from __future__ import annotations

import logging
import os
import re

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# Shorter values ("1", "true") are settings, which occur in many lines.
SHORTEST_SECRET = 8


def redact(text: str) -> str:
    """``text`` with every secret of this process's environment replaced by the name of its variable."""
    secrets = {
        value: name
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and value in text
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, f"<{secrets[value]}>")
    return text


class RedactingFormatter(logging.Formatter):
    """Formats a log record, its traceback included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
