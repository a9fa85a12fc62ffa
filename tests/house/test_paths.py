"""Every file and folder of the repository that a document names is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ds_configs/*.md")]
)
# In backquotes: a path from the root of the repository, without a placeholder.
NAMED = re.compile(r"`((?:toolkit|tests|launch|docs|benchmarks|ds_configs)/[\w./-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document: str) -> None:
    named = {name for name in NAMED.findall((ROOT / document).read_text(encoding="utf-8")) if "NAME" not in name}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_contributing_names_every_room() -> None:
    listed = subprocess.run(["git", "ls-files", "toolkit"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rooms = {Path(name).parts[1] for name in listed.split() if name.endswith(".py") and len(Path(name).parts) > 2}
    named = set(re.findall(r"`toolkit/(\w+)/", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert rooms == named
