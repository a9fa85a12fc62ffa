"""The glossary of CONTRIBUTING.md is kept: no text of the project uses a word of dialect for a term of the field."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A pattern, and the terms of the field that say it.
NOT = {
    r"\b(go|goes|going|went|gone) on\b": "resume, continue",
    r"\banew\b": "from scratch, again",
    r"\b(tell|tells|told|telling)\b(?!\()": "report, state, print, show",
    r"\bmend(s|ed|ing)?\b": "fix, correct",
    r"\bby heart\b|\bby_heart\b": "overfit",
    r"\bset(s|ting)? aside\b|\baside\b|set_aside": "move, archive",
    r"\bsettl(e|es|ed|ing)\b": "decide, agree, finish",
    r"\bspeaks?\b(?! (Hindi|English|a language))": "is the local main rank, prints",
    r"(?<!word )(?<!sentence)\bpieces?\b": "shard, partition, part",
    r"(?<![\"'`=])\bcuts?\b(?![\"'`])|\bcutting\b": "truncate, partition, shard, split",
    r"\bwhoever\b|\bwhence\b|\bfor ever\b|\bcomes? by\b|\blast words\b": "plain words",
}
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".sh", ".js", ".html", ".css")
# The rule itself, and what others wrote or recorded.
EXEMPT = (
    "CONTRIBUTING.md",
    "tests/house/test_language.py",
    "tests/house/messages.txt",
    "benchmarks/results",
    "toolkit/corpus/words.txt",
)


def texts() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    names = [name for name in listed if name.endswith(SUFFIXES) and not name.startswith(EXEMPT)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def rooms() -> dict[str, list[Path]]:
    """Files by the two first folders of their paths."""
    found: dict[str, list[Path]] = {}
    for path in texts():
        folder = path.relative_to(ROOT).parent.parts[:2]
        found.setdefault("/".join(folder) or ".", []).append(path)
    return found


@pytest.mark.parametrize("room", sorted(rooms()))
def test_terms_of_the_field_are_used(room: str) -> None:
    found = []
    for path in rooms()[room]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, write: {terms}"
                for pattern, terms in NOT.items()
                for match in re.finditer(pattern, line, re.IGNORECASE)
            ]
    assert not found, "\n".join(found)
