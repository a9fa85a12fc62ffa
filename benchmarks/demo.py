#!/usr/bin/env python
"""From a bare clone to printed scores: how long `make demo` takes and what it reaches.

python benchmarks/demo.py        clones this repository's HEAD into a temporary folder and runs `make demo` there

Writes benchmarks/results/demo.json. The peers are the floors: scores of sentences chosen without the poses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
# The first line of each stage of `make demo`.
STAGES = {
    "set-up": r"^setup: ",
    "ops": r"^op ",
    "corpus": r"clips|corpora",
    "training": r"^model: ",
    "scoring": r"^scoring ",
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        outer = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "TORCH_EXTENSIONS_DIR")}
        started = time.monotonic()
        begins: dict[str, float] = {}
        with subprocess.Popen(
            ["make", "demo"], cwd=clone, env=outer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                note_stage(line, time.monotonic() - started, begins)
        total = time.monotonic() - started
        if process.returncode:
            sys.exit(f"make demo ended with {process.returncode}")
        scores = json.loads((clone / "runs" / "demo" / "scores.json").read_text(encoding="utf-8"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary(scores, begins, total), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(ROOT)}")


def note_stage(line: str, now: float, begins: dict[str, float]) -> None:
    """Remember when each stage printed its first line; stages come in order."""
    order = list(STAGES)
    for name in order[len(begins) :]:
        if re.search(STAGES[name], line):
            begins.setdefault(name, now)
            return


def summary(scores: dict, begins: dict[str, float], total: float) -> dict:
    """The content of the results file."""
    names = [name for name in STAGES if name in begins]
    ends = [*(begins[name] for name in names[1:]), total]
    return {
        "cores": os.cpu_count(),
        "minutes": round(total / 60, 2),
        "minutes_by_stage": {name: round((end - begins[name]) / 60, 2) for name, end in zip(names, ends, strict=True)},
        "optimizer_minutes": round(scores["training_seconds"] / 60, 2),
        "steps": scores["steps"],
        "splits": scores["splits"],
        "signature": scores["signature"],
    }


if __name__ == "__main__":
    main()
